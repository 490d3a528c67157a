"""The tables of the runtime service's database."""

from __future__ import annotations

COLLECTION = """
CREATE TABLE collection (                     -- one row: the newest epoch of garbage collection
    token TEXT NOT NULL,
    open  INTEGER NOT NULL
);
INSERT INTO collection VALUES ('', 0);
CREATE TABLE collection_kept (                -- what was held at some time within it, and may no longer be
    namespace    TEXT NOT NULL,
    id           TEXT NOT NULL,
    snapshotter  TEXT NOT NULL,
    snapshot_key TEXT NOT NULL,
    labels       BLOB NOT NULL
);
CREATE TRIGGER container_deleted AFTER DELETE ON containers WHEN (SELECT open FROM collection)
BEGIN
    INSERT INTO collection_kept VALUES (OLD.namespace, OLD.id, OLD.snapshotter, OLD.snapshot_key, OLD.labels);
END;
CREATE TRIGGER container_changed AFTER UPDATE OF snapshotter, snapshot_key, labels ON containers
WHEN (SELECT open FROM collection)
BEGIN
    INSERT INTO collection_kept VALUES (OLD.namespace, OLD.id, OLD.snapshotter, OLD.snapshot_key, OLD.labels);
END;
"""

SANDBOXES = """
CREATE TABLE sandboxes (                      -- as their owners store them
    namespace TEXT NOT NULL,
    id        TEXT NOT NULL,
    labels    BLOB NOT NULL,                  -- those of `record`, for garbage collection
    record    BLOB NOT NULL,
    PRIMARY KEY (namespace, id)
);
CREATE TABLE running_sandboxes (              -- what their controller has; a sandbox needn't be stored to be one
    namespace   TEXT NOT NULL,
    id          TEXT NOT NULL,
    sandboxer   TEXT NOT NULL,
    netns_path  TEXT NOT NULL,
    annotations BLOB NOT NULL,
    state       TEXT NOT NULL,                -- created, ready, stopped
    created_at  REAL NOT NULL,
    started_at  REAL,
    exited_at   REAL,
    exit_status INTEGER NOT NULL DEFAULT 0,
    PRIMARY KEY (namespace, id)
) WITHOUT ROWID;
CREATE TRIGGER sandbox_deleted AFTER DELETE ON sandboxes WHEN (SELECT open FROM collection)
BEGIN
    INSERT INTO collection_kept VALUES (OLD.namespace, OLD.id, '', '', OLD.labels);
END;
CREATE TRIGGER sandbox_changed AFTER UPDATE OF labels ON sandboxes WHEN (SELECT open FROM collection)
BEGIN
    INSERT INTO collection_kept VALUES (OLD.namespace, OLD.id, '', '', OLD.labels);
END;
"""

MOUNTS = """
CREATE TABLE mounts (                         -- activations: a row comes before the first mount, and goes last
    namespace  TEXT NOT NULL,
    name       TEXT NOT NULL,
    request_id TEXT NOT NULL,
    place      TEXT NOT NULL UNIQUE,          -- the directory, below the state directory, that it is mounted in
    state      TEXT NOT NULL,                 -- making, made, removing
    lease      TEXT NOT NULL,
    labels     BLOB NOT NULL,
    active     BLOB NOT NULL DEFAULT x'90',
    system     BLOB NOT NULL DEFAULT x'90',
    stamped    INTEGER NOT NULL DEFAULT 1,    -- made, changed or used within the newest epoch of garbage collection
    created_at REAL NOT NULL,
    updated_at REAL NOT NULL,
    PRIMARY KEY (namespace, name)
);
"""

MIGRATIONS = [
    """
CREATE TABLE containers (
    namespace    TEXT NOT NULL,
    id           TEXT NOT NULL,
    request_id   TEXT NOT NULL,      -- of the request that made it: a resumed one knows its own work again
    image        TEXT NOT NULL,
    labels       BLOB NOT NULL,
    runtime      TEXT NOT NULL,
    options      BLOB NOT NULL,
    snapshotter  TEXT NOT NULL,
    snapshot_key TEXT NOT NULL,
    network      TEXT NOT NULL,
    spec         BLOB NOT NULL,
    created_at   REAL NOT NULL,
    updated_at   REAL NOT NULL,
    PRIMARY KEY (namespace, id)
);
CREATE TABLE tasks (                          -- a row for each process; the first one's exec_id is empty
    namespace     TEXT NOT NULL,
    id            TEXT NOT NULL,
    exec_id       TEXT NOT NULL DEFAULT '',
    request_id    TEXT NOT NULL,
    start_request TEXT NOT NULL DEFAULT '',   -- of the start that is under way, or has been made
    status        TEXT NOT NULL,              -- creating, created, running, paused, stopped
    pid           INTEGER NOT NULL DEFAULT 0,
    bundle        TEXT NOT NULL DEFAULT '',
    rootfs        BLOB NOT NULL DEFAULT x'',
    process       BLOB NOT NULL DEFAULT x'',  -- of an exec: the OCI process
    stdio         BLOB NOT NULL,
    checkpoint    TEXT NOT NULL DEFAULT '',   -- what starting it restores
    exit_pid      INTEGER,                    -- an exit heard before `status` could say so waits in these three
    exit_status   INTEGER,
    exited_at     REAL,
    oom_kills     INTEGER NOT NULL DEFAULT 0, -- heard of, and told in an event
    oom_told      INTEGER NOT NULL DEFAULT 0,
    PRIMARY KEY (namespace, id, exec_id)
);
CREATE TABLE runs (                           -- what a run makes: the row comes before the first of it, and goes last
    namespace   TEXT NOT NULL,
    id          TEXT NOT NULL,
    request_id  TEXT NOT NULL,
    state       TEXT NOT NULL,                -- making, made, removing
    plan        BLOB NOT NULL,
    auto_remove INTEGER NOT NULL,
    PRIMARY KEY (namespace, id)
);
CREATE TABLE exits (                          -- of tasks that were removed with their container, for who waits late
    namespace   TEXT NOT NULL,
    id          TEXT NOT NULL,
    pid         INTEGER NOT NULL,
    exit_status INTEGER NOT NULL,
    exited_at   REAL NOT NULL,
    kept_until  REAL NOT NULL,
    PRIMARY KEY (namespace, id)
) WITHOUT ROWID;
""",
    """
CREATE TABLE restarts (                       -- of containers that are to run or to be stopped: there is a label for it
    namespace  TEXT NOT NULL,
    id         TEXT NOT NULL,
    request_id TEXT NOT NULL DEFAULT '',      -- of the newest start from here
    plan       BLOB NOT NULL DEFAULT x'',     -- what that one makes the task of
    pause      REAL NOT NULL DEFAULT 0,       -- seconds between the end before it and it
    began_at   REAL NOT NULL DEFAULT 0,
    failed_at  REAL NOT NULL DEFAULT 0,       -- 0 unless it came to nothing
    killed_at  REAL NOT NULL DEFAULT 0,       -- when a client last asked for a signal
    held_until REAL NOT NULL DEFAULT 0,
    PRIMARY KEY (namespace, id)
) WITHOUT ROWID;
""",
    """
ALTER TABLE tasks ADD COLUMN auto_remove INTEGER NOT NULL DEFAULT 0;  -- of an exec: removed when it has ended
CREATE INDEX execs_to_remove ON tasks (status) WHERE auto_remove;
""",
    COLLECTION,
    """
ALTER TABLE containers ADD COLUMN spec_type TEXT;          -- of a spec that is a client's bytes; NULL: it is msgpack
ALTER TABLE containers ADD COLUMN packed_options BLOB;
ALTER TABLE containers ADD COLUMN sandbox TEXT NOT NULL DEFAULT '';
ALTER TABLE containers ADD COLUMN extensions BLOB NOT NULL DEFAULT x'80';
""",
    SANDBOXES,
    MOUNTS,
]
