// Package storetest is the suite that every store of the CA passes: one contract, however it is kept.
package storetest

import (
	"context"
	"testing"
	"time"

	"github.com/meshca/meshca/ca"
	"github.com/meshca/meshca/rotation"
)

// Store is what a store does, by who asks it.
type Store interface {
	ca.BundleStore
	rotation.Journal
	Ledger
	Denials
	RenewOrders
	Agents
	Prober
	Marks
	Close() error
}

// Ledger keeps the ledger: see ca.LedgerStore. Entries are read newest first; pruning drops whole groups from the old
// end, up to the first that has not ended, but for those of a clock far ahead, which NoteEnded has found.
type Ledger interface {
	ca.LedgerStore
	ScanLedger(ctx context.Context, fn func(ca.LedgerEntry) (bool, error)) error
	// ScanLiving is for the entries that end after a moment, wherever they are. NoteEnded has it look no further than it must.
	ScanLiving(ctx context.Context, at time.Time, fn func(ca.LedgerEntry) (bool, error)) error
	NoteEnded(ctx context.Context, at time.Time) error
	PruneLedger(ctx context.Context, before time.Time) (uint64, error)
	LedgerSize(ctx context.Context) (uint64, error)
}

// Denials keeps one denial an identity, ordered by identity.
type Denials interface {
	PutDenial(ctx context.Context, d ca.Denial) error
	DeleteDenial(ctx context.Context, id string) (bool, error)
	Denials(ctx context.Context) ([]ca.Denial, error)
}

// RenewOrders keeps the orders that were set last, each until its Until.
type RenewOrders interface {
	SetRenewOrders(ctx context.Context, all []ca.RenewOrder) error
	RenewOrders(ctx context.Context) ([]ca.RenewOrder, error)
}

// Agents keeps one record an agent, ordered by ID.
type Agents interface {
	Agent(ctx context.Context, id string) (ca.AgentRecord, bool, error)
	PutAgent(ctx context.Context, r ca.AgentRecord) error
	UpdateAgent(ctx context.Context, id string, change func(*ca.AgentRecord) error) error
	DeleteAgent(ctx context.Context, id string) (bool, error)
	Agents(ctx context.Context) ([]ca.AgentRecord, error)
}

// Marks tell one state of the bundle, the rollout, denials and orders from another: see ca.Mark. HasMark says no only
// where it is certain that a state was none of this store's. A change and its mark are durable together.
type Marks interface {
	Mark() (ca.Mark, <-chan struct{})
	HasMark(ctx context.Context, m ca.Mark) (bool, error)
	History(ctx context.Context) (ca.History, error)
	PutLoss(ctx context.Context, l ca.Loss) error
	AcceptLoss(ctx context.Context, beyond uint64) error
}

// Prober tells whether the store can write, by a durable write that leaves nothing behind.
type Prober interface {
	Probe(ctx context.Context) error
}

// Opener opens the store at a place, a directory of the test's own; what was stored there before is there again.
type Opener func(t *testing.T, place string) Store

// Run runs the suite.
func Run(t *testing.T, open Opener) {
	for name, test := range map[string]func(*testing.T, Opener){
		"Bundle":                testBundle,
		"BundleRace":            testBundleRace,
		"Rollout":               testRollout,
		"LedgerOrder":           testLedgerOrder,
		"LedgerPages":           testLedgerPages,
		"LedgerPruning":         testLedgerPruning,
		"LedgerConcurrency":     testLedgerConcurrency,
		"LedgerKeepsNoSlices":   testLedgerKeepsNoSlices,
		"Denials":               testDenials,
		"RenewOrders":           testRenewOrders,
		"Agents":                testAgents,
		"AgentUpdatesAreAtomic": testAgentUpdates,
		"Probe":                 testProbe,
		"Marks":                 testMarks,
		"MarkedChanges":         testMarkedChanges,
		"Losses":                testLosses,
		"EndedContext":          testEndedContext,
		"Model":                 testModel,
	} {
		t.Run(name, func(t *testing.T) { test(t, open) })
	}
}

// opened opens a store at a new place and closes it with the test.
func opened(t *testing.T, open Opener) Store {
	t.Helper()
	s := open(t, t.TempDir())
	t.Cleanup(func() {
		if err := s.Close(); err != nil {
			t.Errorf("closing the store: %v", err)
		}
	})
	return s
}

// reopened closes s and opens its place again: what was acknowledged is there.
func reopened(t *testing.T, open Opener, s Store, place string) Store {
	t.Helper()
	if err := s.Close(); err != nil {
		t.Fatalf("closing the store: %v", err)
	}
	return open(t, place)
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}
