package bolt

import (
	"cmp"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"

	"go.etcd.io/bbolt"
	bolterrors "go.etcd.io/bbolt/errors"
)

// foldAfter is how long a group is in the log alone where no area fills up: what the bucket lacks is little, and a start
// after a kill has little to do.
const foldAfter = time.Second

// appender is the ledger's young end: groups that are durable in the log, until they are folded into the bucket.
type appender struct {
	db *bbolt.DB
	// update is db.Update. renew puts an empty log in place, behind that index.
	update func(func(*bbolt.Tx) error) error
	renew  func(base uint64) (*wal, error)

	// appending guards log. Who holds it and folds has all in the bucket, and nothing comes meanwhile.
	appending sync.Mutex
	log       *wal

	// folding is held by the one who folds.
	folding sync.Mutex
	later   *time.Timer

	mu sync.Mutex // guards what follows; last and closed change only while appending is held, too
	// pending is what the bucket lacks, last the index of the last entry.
	pending []group
	last    uint64
	// failed says why the log cannot be written, unstored why the last fold has failed.
	failed, unstored error
	closed           bool
}

// append makes n entries durable, as a group of this value.
func (a *appender) append(value []byte, n int) error {
	a.appending.Lock()
	defer a.appending.Unlock()
	if err := a.mend(); err != nil {
		return err
	}
	g := group{first: a.last + 1, last: a.last + uint64(n), value: value}
	if !a.log.holds(g) {
		return a.pass(g)
	}
	if !a.log.fits(g) {
		if err := a.turn(); err != nil {
			return err
		}
	}
	if err := a.log.append(g); err != nil {
		return a.fails(fmt.Errorf("writing the ledger's log: %w", err))
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	a.last = g.last
	if a.pending = append(a.pending, g); len(a.pending) == 1 {
		a.later.Reset(foldAfter)
	}
	return nil
}

// mend has a fold tried again that has failed, and begins a new log where nobody knows what a failed write has left in this
// one. So an issuance is refused as long as the store cannot take it, though the log might have room.
func (a *appender) mend() error {
	if a.closed {
		return bolterrors.ErrDatabaseNotOpen
	}
	if !a.log.torn {
		if a.ready() == nil {
			return nil
		}
		return a.fold()
	}
	// Where a commit has failed at its end, bbolt shows more than may be durable. Another commit makes it so.
	if err := a.commit(true); err != nil {
		return err
	}
	last, err := a.stored()
	if err != nil {
		return err
	}
	log, err := a.renew(last)
	if err != nil {
		return a.fails(err)
	}
	if a.log.file != nil {
		_ = a.log.file.Close() // it failed, or another one is in its place
	}
	a.log = log
	a.mu.Lock()
	defer a.mu.Unlock()
	a.last = last // a group that went by the log, and was refused, may be there
	a.failed = nil
	return nil
}

// fails keeps why a write has failed, and returns it.
func (a *appender) fails(err error) error {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.failed = err
	return err
}

// ready says why the log cannot be written or the last fold has failed; nil when neither is so.
func (a *appender) ready() error {
	a.mu.Lock()
	defer a.mu.Unlock()
	return cmp.Or(a.failed, a.unstored)
}

// turn goes on in the log's other area, of which all has been folded, and has what is in this one folded meanwhile.
func (a *appender) turn() error {
	if a.folded() < a.log.overwrites() {
		if err := a.fold(); err != nil {
			return err
		}
	}
	a.log.turn()
	a.later.Reset(0)
	return nil
}

// folded is the index of the last entry in the bucket, at least.
func (a *appender) folded() uint64 {
	a.mu.Lock()
	defer a.mu.Unlock()
	if len(a.pending) > 0 {
		return a.pending[0].first - 1
	}
	return a.last
}

// pass stores a group that no area can hold. A new log begins behind it: in an area, one record follows the other.
func (a *appender) pass(g group) error {
	if err := a.fold(); err != nil {
		return err
	}
	a.log.torn = true
	err := a.update(func(tx *bbolt.Tx) error {
		if err := putGroups(tx, []group{g}); err != nil {
			return err
		}
		return tx.Bucket(bucketMeta).Put(keyPassed, indexKey(g.last))
	})
	if err != nil {
		return a.fails(err)
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	a.last = g.last
	return nil
}

// fold brings into the bucket what was pending as it began.
func (a *appender) fold() error { return a.commit(false) }

// commit folds; always: also where nothing is pending.
func (a *appender) commit(always bool) error {
	a.folding.Lock()
	defer a.folding.Unlock()
	a.mu.Lock()
	groups := a.pending
	a.mu.Unlock()
	if len(groups) == 0 && !always {
		return nil
	}
	err := a.store(groups)
	// gofail: var ledgerFolded struct{}

	a.mu.Lock()
	defer a.mu.Unlock()
	if a.unstored = err; err == nil {
		a.pending = slices.Clone(a.pending[len(groups):])
	}
	if len(a.pending) > 0 && !a.closed {
		a.later.Reset(foldAfter)
	}
	return err
}

// store puts groups into the bucket.
func (a *appender) store(groups []group) error {
	return a.update(func(tx *bbolt.Tx) error { return putGroups(tx, groups) })
}

// stored is the index of the last entry that the bucket has had.
func (a *appender) stored() (last uint64, err error) {
	err = a.db.View(func(tx *bbolt.Tx) error { last = tx.Bucket(bucketLedger).Sequence(); return nil })
	return last, err
}

// putGroups puts groups behind what the bucket has. Some may be there: where a commit fails at its end, bbolt shows what it
// has written all the same.
func putGroups(tx *bbolt.Tx, groups []group) error {
	b := tx.Bucket(bucketLedger)
	b.FillPercent = 1 // keys only ever grow
	last := b.Sequence()
	for _, g := range groups {
		if g.last <= last {
			continue
		}
		if g.first != last+1 {
			return fmt.Errorf("entry %d of the ledger would follow entry %d", g.first, last)
		}
		if err := b.Put(indexKey(g.first), g.value); err != nil {
			return err
		}
		last = g.last
	}
	return b.SetSequence(last)
}

// settle has all in the bucket, and nothing come until resume is called.
func (a *appender) settle() (resume func(), err error) {
	a.appending.Lock()
	return sync.OnceFunc(a.appending.Unlock), a.fold()
}

// probe mends what has failed, and tells whether the log can be written.
func (a *appender) probe() error {
	a.appending.Lock()
	defer a.appending.Unlock()
	if err := a.mend(); err != nil {
		return err
	}
	if err := a.log.probe(); err != nil {
		return a.fails(err)
	}
	return nil
}

// unfolded are the groups that the bucket may lack, and the index of the last entry.
func (a *appender) unfolded() ([]group, uint64) {
	a.mu.Lock()
	defer a.mu.Unlock()
	return slices.Clip(a.pending), a.last
}

// close lets nothing come any more, and folds.
func (a *appender) close() error {
	a.appending.Lock()
	defer a.appending.Unlock()
	a.mu.Lock()
	a.closed = true
	a.mu.Unlock()
	a.later.Stop()
	err := a.fold()
	if a.log.file != nil {
		err = errors.Join(err, a.log.file.Close())
	}
	return err
}
