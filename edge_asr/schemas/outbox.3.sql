-- The outbox, schema version 3: which broker takes the messages, for whoever looks at the file.

CREATE TABLE broker (address TEXT NOT NULL, since_wall_ns INTEGER NOT NULL);
INSERT INTO broker VALUES ('', 0);
