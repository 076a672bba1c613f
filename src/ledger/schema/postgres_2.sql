-- Version 2 of the shared ledger: jobs can be found by their campaign, which a row's body has as well (by an
-- index that is made beside the work, see src/ledger/postgres/index.rs). Workers of version 1 go on beside
-- it; rows that they write are of no campaign here. No statement here reads or writes a table's rows: each
-- takes its lock for a moment only, once it gets it.

-- When bulk gets places at the end of the line, however far ahead it is: it is never starved.
ALTER TABLE checkout_worker.budget ADD COLUMN bulk_at bigint NOT NULL DEFAULT 0;

-- Until when some worker says that Creem is down.
ALTER TABLE checkout_worker.budget ADD COLUMN down_until bigint NOT NULL DEFAULT 0;

ALTER TABLE checkout_worker.job ADD COLUMN campaign text COLLATE "C";
