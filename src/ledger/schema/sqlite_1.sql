-- Version 1 of the embedded ledger. `job` has one row per (mode, request_id); what the columns
-- mean is said in src/ledger/row.rs. `sum` is a checksum over the row, verified on every read.
CREATE TABLE meta (
    name  TEXT PRIMARY KEY,
    value BLOB NOT NULL
) STRICT, WITHOUT ROWID;

CREATE TABLE job (
    mode        TEXT NOT NULL,
    request_id  TEXT NOT NULL,
    state       TEXT NOT NULL,
    updated_at  INTEGER NOT NULL,
    ended_at    INTEGER,
    ambiguous   INTEGER NOT NULL,
    body        BLOB NOT NULL,
    sum         BLOB NOT NULL,
    PRIMARY KEY (mode, request_id)
) STRICT, WITHOUT ROWID;

-- Retention looks for old ended rows; unfinished rows are not in the index.
CREATE INDEX job_ended ON job (ended_at) WHERE ended_at IS NOT NULL;

-- Sessions that Creem is known to hold and that nobody was given.
CREATE TABLE orphan (
    id          INTEGER PRIMARY KEY,
    mode        TEXT NOT NULL,
    request_id  TEXT NOT NULL,
    fence       INTEGER NOT NULL,
    checkout_id TEXT NOT NULL,
    reason      TEXT NOT NULL,
    found_at    INTEGER NOT NULL,
    UNIQUE (mode, request_id, checkout_id)
) STRICT;

-- Times in which nothing could be tried, so that they do not count against a job.
CREATE TABLE pause (
    started INTEGER PRIMARY KEY,
    ended   INTEGER NOT NULL
) STRICT;
