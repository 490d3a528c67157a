"""The tables of `metadata.db`.

Bytes are the node's, and so is `blobs`; what a namespace sees of them is `visible`. A pull under way has a row in
`pulls`, and in `holds` whatever it needs: written before the thing itself, so that nothing collects it. `unpacked` says
which snapshots an image's layers became, `doomed` which of them nobody needs any more.
"""

from __future__ import annotations

CLAIMS = """
    CREATE TABLE claims (              -- hard links that keep a blob's bytes for who was given their path
        namespace  TEXT NOT NULL,
        digest     TEXT NOT NULL,
        token      TEXT NOT NULL UNIQUE,
        expires_at REAL NOT NULL,
        PRIMARY KEY (namespace, digest)
    ) WITHOUT ROWID;
"""
SCRUB = """
    CREATE TABLE rotten (              -- blobs whose bytes are damaged, or gone
        digest     TEXT PRIMARY KEY REFERENCES blobs (digest) ON DELETE CASCADE,
        problem    TEXT NOT NULL,
        inode      INTEGER NOT NULL,   -- of the file that has them; 0 where there is none
        found_at   REAL NOT NULL
    ) WITHOUT ROWID;
    CREATE TABLE scrub (               -- the one row says how far the pass in the background is
        id         INTEGER PRIMARY KEY CHECK (id = 1),
        position   TEXT NOT NULL,      -- the last digest that was checked; empty between passes
        ended_at   REAL NOT NULL       -- when the last pass was over
    );
"""
MIGRATIONS = [
    """
    CREATE TABLE blobs (
        digest     TEXT PRIMARY KEY,
        size       INTEGER NOT NULL
    ) WITHOUT ROWID;
    CREATE TABLE visible (
        namespace  TEXT NOT NULL,
        digest     TEXT NOT NULL REFERENCES blobs (digest),
        labels     TEXT NOT NULL,
        created_at REAL NOT NULL,
        updated_at REAL NOT NULL,
        PRIMARY KEY (namespace, digest)
    ) WITHOUT ROWID;
    CREATE INDEX visible_digest ON visible (digest);
    CREATE TABLE ingests (
        namespace  TEXT NOT NULL,
        ref        TEXT NOT NULL,
        file       TEXT NOT NULL UNIQUE,
        total      INTEGER NOT NULL,
        expected   TEXT NOT NULL,
        pull       TEXT NOT NULL,      -- the pull it is for; empty for a client's own
        labels     TEXT NOT NULL,
        started_at REAL NOT NULL,
        updated_at REAL NOT NULL,
        placing    TEXT NOT NULL DEFAULT '',  -- the digest under which its file is about to be a blob
        session    TEXT NOT NULL DEFAULT '',  -- its writer, until
        session_until REAL NOT NULL DEFAULT 0,
        PRIMARY KEY (namespace, ref)
    ) WITHOUT ROWID;
    CREATE INDEX ingests_placing ON ingests (placing) WHERE placing != '';
    CREATE TABLE images (
        namespace  TEXT NOT NULL,
        name       TEXT NOT NULL,
        target     TEXT NOT NULL,
        labels     TEXT NOT NULL,
        created_at REAL NOT NULL,
        updated_at REAL NOT NULL,
        request_id TEXT NOT NULL,
        PRIMARY KEY (namespace, name)
    ) WITHOUT ROWID;
    CREATE TABLE unpacked (
        namespace   TEXT NOT NULL,
        image       TEXT NOT NULL,
        snapshotter TEXT NOT NULL,
        chain_id    TEXT NOT NULL,
        depth       INTEGER NOT NULL,
        PRIMARY KEY (namespace, image, snapshotter, chain_id)
    ) WITHOUT ROWID;
    CREATE INDEX unpacked_chain ON unpacked (namespace, snapshotter, chain_id);
    CREATE TABLE pulls (
        id         TEXT PRIMARY KEY,
        namespace  TEXT NOT NULL,
        nonce      TEXT NOT NULL
    ) WITHOUT ROWID;
    CREATE TABLE holds (
        pull        TEXT NOT NULL REFERENCES pulls (id),
        namespace   TEXT NOT NULL,
        snapshotter TEXT NOT NULL,     -- empty: `key` is a blob's digest, else a chain ID
        key         TEXT NOT NULL,
        depth       INTEGER NOT NULL,
        made        INTEGER NOT NULL,  -- it wasn't there before: it goes again if this pull fails
        PRIMARY KEY (pull, snapshotter, key)
    ) WITHOUT ROWID;
    CREATE INDEX holds_key ON holds (key);
    CREATE VIEW unwanted AS SELECT digest FROM blobs
        WHERE NOT EXISTS (SELECT 1 FROM visible WHERE visible.digest = blobs.digest)
          AND NOT EXISTS (SELECT 1 FROM holds WHERE holds.key = blobs.digest AND holds.snapshotter = '');
    CREATE TABLE doomed (
        namespace   TEXT NOT NULL,
        snapshotter TEXT NOT NULL,
        chain_id    TEXT NOT NULL,
        depth       INTEGER NOT NULL,
        until       REAL NOT NULL,     -- looked for again till then, even where it isn't there
        PRIMARY KEY (namespace, snapshotter, chain_id)
    ) WITHOUT ROWID;
    CREATE TABLE namespaces (
        name       TEXT PRIMARY KEY,
        labels     TEXT NOT NULL
    ) WITHOUT ROWID;
    """,
    CLAIMS,
    SCRUB,
]
