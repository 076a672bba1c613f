-- Version 1 of the shared ledger. `job` has one row per (mode, request_id); what the columns mean is
-- said in src/ledger/row.rs. `version` is raised by every write, `sum` is a checksum over the row,
-- verified on every read, and `prior` the one of the row before. Every write compares the first two:
-- the version alone would not tell a row from its like that a failover has brought back.
CREATE TABLE checkout_worker.job (
    mode        text COLLATE "C" NOT NULL,
    request_id  text COLLATE "C" NOT NULL,
    state       text COLLATE "C" NOT NULL,
    version     bigint  NOT NULL,
    updated_at  bigint  NOT NULL,
    ended_at    bigint,
    ambiguous   integer NOT NULL,
    body        bytea   NOT NULL,
    sum         bytea   NOT NULL,
    prior       bytea   NOT NULL,
    PRIMARY KEY (mode, request_id)
) WITH (
    -- A row is written twice and then only read: room on its page keeps both versions together.
    fillfactor = 70,
    autovacuum_vacuum_scale_factor = 0.02,
    autovacuum_analyze_scale_factor = 0.05
);

-- Retention looks for old ended rows; unfinished rows are not in the index.
CREATE INDEX job_ended ON checkout_worker.job (ended_at) WHERE ended_at IS NOT NULL;

-- Attempts after which a session may exist that nobody was given, one row each: the how manieth of
-- their job's row it is, and when that row was made, as the count begins anew when a row is swept.
CREATE TABLE checkout_worker.ambiguous_attempt (
    mode        text COLLATE "C" NOT NULL,
    request_id  text COLLATE "C" NOT NULL,
    number      bigint NOT NULL,
    created_at  bigint NOT NULL,
    found_at    bigint NOT NULL,
    PRIMARY KEY (mode, request_id, number, created_at)
);

-- Sessions that Creem is known to hold and that nobody was given.
CREATE TABLE checkout_worker.orphan (
    mode        text COLLATE "C" NOT NULL,
    request_id  text COLLATE "C" NOT NULL,
    checkout_id text NOT NULL,
    fence       bigint NOT NULL,
    reason      text   NOT NULL,
    found_at    bigint NOT NULL,
    PRIMARY KEY (mode, request_id, checkout_id)
);

-- Times in which nothing could be tried, so that they do not count against a job.
CREATE TABLE checkout_worker.pause (
    started bigint NOT NULL,
    ended   bigint NOT NULL,
    PRIMARY KEY (started, ended)
);

-- What the ledger knows of itself: `secret` (of fingerprints and hops), `adopted` and `refused` (the
-- guard of a new ledger), `restored` and `swept` (what it may have forgotten), `alive` (some worker's last sign of life).
CREATE TABLE checkout_worker.meta (
    name  text PRIMARY KEY,
    value bytea,
    number bigint
);

-- How fast Creem may be asked by all workers together, in microseconds of the database's clock: when
-- the next place is, and until when all are quiet.
CREATE TABLE checkout_worker.budget (
    mode        text PRIMARY KEY,
    next_at     bigint NOT NULL,
    quiet_until bigint NOT NULL,
    -- A clock that shows less has been set back since, and the row holds no longer.
    written_at  bigint NOT NULL
);
