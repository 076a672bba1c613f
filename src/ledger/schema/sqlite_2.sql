-- Version 2 of the embedded ledger: jobs can be found by their campaign, which a row's body has as well.
ALTER TABLE job ADD COLUMN campaign TEXT;

CREATE INDEX job_campaign ON job (campaign, state) WHERE campaign IS NOT NULL;
