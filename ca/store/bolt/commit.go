package bolt

import (
	"errors"
	"fmt"
	"io"
	"sync"
	"sync/atomic"

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

	// fault says why nothing can be written; nil where it can, as far as is known.
	fault atomic.Pointer[error]

	mu sync.Mutex
	// sure says that what bbolt shows is durable.
	sure bool
	// shown is the state that it showed behind a commit that failed: what it holds in memory belongs to that one. 0: none has.
	shown int
}

func newCommitter(db *bbolt.DB, file dataFile) *committer {
	return &committer{db: db, file: file, commit: db.Update}
}

// update is bbolt's Update.
func (c *committer) update(fn func(*bbolt.Tx) error) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if err := c.settle(); err != nil {
		err = fmt.Errorf("making durable what a commit has left that failed: %w", err)
		c.fault.Store(&err)
		return err
	}
	c.fault.Store(nil)
	begun := false // to write
	c.sure = false // also where it panics
	err := c.commit(func(tx *bbolt.Tx) error {
		err := fn(tx)
		begun = err == nil
		return err
	})
	if c.sure = err == nil || !begun; !c.sure {
		c.fault.Store(&err)
		c.shown = c.state()
	}
	return err
}

// state is the number of the one that bbolt shows; 0 where it shows none.
func (c *committer) state() int {
	tx, err := c.db.Begin(false)
	if err != nil {
		return 0
	}
	defer func() { _ = tx.Rollback() }()
	return tx.ID()
}

// ready says why nothing can be written; nil where it can, as far as is known.
func (c *committer) ready() error {
	if err := c.fault.Load(); err != nil {
		return *err
	}
	return nil
}

var (
	errStillRead = errors.New("the store is still being read as it was before")
	errForgotten = errors.New("the disk has lost what was written to it: restart the CA")
)

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
	if c.shown != 0 && tx.ID() != c.shown { // the page was dropped, and read again as the disk has it
		return errForgotten
	}
	page := make([]byte, c.db.Info().PageSize)
	at := int64(tx.ID()%2) * int64(len(page)) // the two meta pages take turns
	if _, err := c.file.ReadAt(page, at); err != nil {
		return err
	}
	if err := c.file.WriteDurably(page, at); err != nil {
		return err
	}
	c.sure, c.shown = true, 0
	return nil
}
