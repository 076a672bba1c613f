-- Version 3 of the shared ledger: workers learn together how fast Creem may be asked. Workers of the versions before
-- go on beside it; they learn by themselves, and take places as far apart as their own ceiling says. No statement here
-- reads or writes a table's rows.

-- Up to when interactive jobs have places: they may have overtaken those that bulk has. Never beyond `next_at`.
ALTER TABLE checkout_worker.budget ADD COLUMN interactive_next_at bigint NOT NULL DEFAULT 0;

-- The rate that all have learned, as src/pace/kept.rs writes it, how often it was written, when it was so in
-- microseconds of the database's clock, and how far apart calls are by it, in microseconds.
CREATE TABLE checkout_worker.rate (
    mode        text PRIMARY KEY,
    version     bigint NOT NULL,
    learned     text   NOT NULL,
    learned_at  bigint NOT NULL,
    interval_us bigint NOT NULL
);
