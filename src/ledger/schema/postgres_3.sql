-- Version 3 of the shared ledger: workers learn together how fast Creem may be asked. Workers of the versions before
-- go on beside it; they learn by themselves, and take places as far apart as their own ceiling says. No statement here
-- reads or writes a table's rows.

-- The rate, as src/pace/kept.rs writes it, how often it was written, and when that was last, in microseconds of the
-- database's clock.
ALTER TABLE checkout_worker.budget ADD COLUMN learned text;
ALTER TABLE checkout_worker.budget ADD COLUMN learned_version bigint NOT NULL DEFAULT 0;
ALTER TABLE checkout_worker.budget ADD COLUMN learned_at bigint NOT NULL DEFAULT 0;

-- Up to when interactive jobs have places, which may lie ahead of those that bulk has.
ALTER TABLE checkout_worker.budget ADD COLUMN buyers_at bigint NOT NULL DEFAULT 0;

-- How far apart places lie by that rate, in microseconds; unknown until somebody has learned something.
ALTER TABLE checkout_worker.budget ADD COLUMN interval_us bigint;
