-- The outbox, schema version 4: every class has limits of its own, and every loss is counted with its class and cause.

ALTER TABLE ledger ADD COLUMN dead_letters INTEGER NOT NULL DEFAULT 0;
ALTER TABLE ledger ADD COLUMN bytes INTEGER NOT NULL DEFAULT 0;    -- of what waits and of dead letters
ALTER TABLE ledger ADD COLUMN refused INTEGER NOT NULL DEFAULT 0;  -- ever put aside as dead letters
ALTER TABLE ledger ADD COLUMN outdated INTEGER NOT NULL DEFAULT 0; -- removed undelivered because of their age

DROP TRIGGER message_in;
DROP TRIGGER message_out;
DROP TRIGGER dead_letter_in;
DROP TRIGGER dead_letter_out;
-- 250: what a row takes besides its data, see retention.ROW_BYTES.
CREATE TRIGGER message_in AFTER INSERT ON message BEGIN
  UPDATE ledger SET waiting = waiting + 1, bytes = bytes + 250 + length(CAST(NEW.data AS BLOB))
  WHERE category = NEW.category;
END;
CREATE TRIGGER message_out AFTER DELETE ON message BEGIN
  UPDATE ledger SET waiting = waiting - 1, bytes = bytes - 250 - length(CAST(OLD.data AS BLOB))
  WHERE category = OLD.category;
END;
CREATE TRIGGER dead_letter_in AFTER INSERT ON dead_letter BEGIN
  UPDATE ledger SET dead_letters = dead_letters + 1, bytes = bytes + 250 + length(CAST(NEW.data AS BLOB))
  WHERE category = NEW.category;
END;
CREATE TRIGGER dead_letter_out AFTER DELETE ON dead_letter BEGIN
  UPDATE ledger SET dead_letters = dead_letters - 1, bytes = bytes - 250 - length(CAST(OLD.data AS BLOB))
  WHERE category = OLD.category;
END;
CREATE INDEX dead_letter_by_category ON dead_letter (category, seq);

UPDATE ledger SET
  dead_letters = (SELECT count(*) FROM dead_letter AS d WHERE d.category = ledger.category),
  refused = (SELECT count(*) FROM dead_letter AS d WHERE d.category = ledger.category),
  bytes = (SELECT coalesce(sum(250 + length(CAST(data AS BLOB))), 0) FROM message AS m WHERE m.category = ledger.category)
    + (SELECT coalesce(sum(250 + length(CAST(data AS BLOB))), 0) FROM dead_letter AS d WHERE d.category = ledger.category);
-- Dead letters had a count of their own, whatever their class; the sum stays right.
UPDATE ledger SET dropped = dropped + (SELECT dropped FROM ledger WHERE category = 'dead-letter')
WHERE category = 'transcript';
DELETE FROM ledger WHERE category = 'dead-letter';

-- The boots of the box, oldest first, and the latest reading of CLOCK_BOOTTIME in each: what an age is made of.
CREATE TABLE boot (number INTEGER PRIMARY KEY, boot_id TEXT NOT NULL UNIQUE, seen_ns INTEGER NOT NULL);
INSERT INTO boot (boot_id, seen_ns) SELECT boot_id, max(created_ns) FROM message GROUP BY boot_id ORDER BY max(seq);

ALTER TABLE broker ADD COLUMN refusal TEXT NOT NULL DEFAULT ''; -- why it takes nothing although it is there
