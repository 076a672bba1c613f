-- Version 3 of the embedded ledger: retention looks for old ended rows of one mode. With both indexes there, SQLite would
-- take neither.
DROP INDEX job_ended;

CREATE INDEX job_mode_ended ON job (mode, ended_at) WHERE ended_at IS NOT NULL;
