package bolt

import (
	"errors"
	"fmt"
	"io"
	"sync"

	"go.etcd.io/bbolt"
)

// committer runs the transactions that write, one after the other.
//
// A commit that fails at its end leaves bbolt showing a state of which nobody knows whether it is durable: its meta page was
// written, and the sync of it failed. The pages that this state has freed are those of the one before, which may be what the
// disk has. Were they written to, and power failed, neither would be left. So before anything else is written the page that
// bbolt shows is made durable; and at a start, too, for the process before may have ended in between.
type committer struct {
	db *bbolt.DB
	// file is the database's own, by which the page is written again.
	file interface {
		io.ReaderAt
		WriteDurably(p []byte, at int64) error
	}
	// commit is db.Update.
	commit func(func(*bbolt.Tx) error) error

	mu sync.Mutex
	// sure says that what bbolt shows is durable.
	sure bool
}

func newCommitter(db *bbolt.DB, file dataFile) *committer {
	return &committer{db: db, file: file, commit: db.Update}
}

// update is bbolt's Update.
func (c *committer) update(fn func(*bbolt.Tx) error) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if err := c.settle(); err != nil {
		return fmt.Errorf("making durable what a commit has left that failed: %w", err)
	}
	begun := false // to write
	c.sure = false // also where it panics
	err := c.commit(func(tx *bbolt.Tx) error {
		err := fn(tx)
		begun = err == nil
		return err
	})
	c.sure = err == nil || !begun
	return err
}

var errStillRead = errors.New("the store is still being read as it was before")

// settle makes durable what bbolt shows; c.mu is held.
func (c *committer) settle() error {
	if c.sure {
		return nil
	}
	// bbolt has forgotten what those read who began before the failure, and would write over it.
	if c.db.Stats().OpenTxN > 0 {
		return errStillRead
	}
	tx, err := c.db.Begin(false)
	if err != nil {
		return err
	}
	defer func() { _ = tx.Rollback() }()
	page := make([]byte, c.db.Info().PageSize)
	at := int64(tx.ID()%2) * int64(len(page)) // the two meta pages take turns
	if _, err := c.file.ReadAt(page, at); err != nil {
		return err
	}
	if err := c.file.WriteDurably(page, at); err != nil {
		return err
	}
	c.sure = true
	return nil
}
