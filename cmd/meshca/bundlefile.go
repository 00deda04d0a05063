package main

import (
	"context"
	"crypto/x509"
	"fmt"
	"log/slog"
	"slices"
	"sync"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"

	"github.com/meshca/meshca/api/refusal"
	"github.com/meshca/meshca/ca"
	"github.com/meshca/meshca/ca/rollout"
	"github.com/meshca/meshca/rotation"
)

// bundleFile is a file that is kept equal to the trust bundle. Readers that cannot acknowledge have the bundle from it, and
// so have agents that were off while a root changed: what is not in it yet, they do not trust.
type bundleFile struct {
	path   string
	bundle func() (*spiffebundle.Bundle, <-chan struct{})
	// hold says why no bundle may be told to anybody now; nil: it may.
	hold func() error
	now  func() time.Time
	log  *slog.Logger
	// readers are those who read it.
	readers []rollout.Reader

	mu sync.Mutex
	// held are the bundles that it has had since this process began, the oldest first.
	held    []heldBundle
	failing outage
	lacking uint64 // the sequence that could not be written
}

// heldBundle is the sequence of a bundle, and since when the file holds that or a later one.
type heldBundle struct {
	sequence uint64
	since    time.Time
}

// heldKept bounds what is remembered of bundles: a rollout asks for the one that it published, and few come after it.
const heldKept = 32

// keep writes each bundle until ctx ends, and tries again what fails.
func (f *bundleFile) keep(ctx context.Context) {
	for {
		err := f.hold() // before the bundle is looked at: what is written has nothing of before that
		bundle, stale := f.bundle()
		var data []byte
		if err == nil {
			data, err = bundle.Marshal()
		}
		// gofail: var bundleFileMade struct{}
		if err == nil {
			err = replaceFile(f.path, data, 0o644)
		}
		// gofail: var bundleFileWritten struct{}
		sequence, _ := bundle.SequenceNumber()
		f.written(sequence, err)
		var again <-chan time.Time
		if err != nil {
			again = time.After(tryAgain)
		}
		select {
		case <-ctx.Done():
			return
		case <-stale:
		case <-again:
		}
	}
}

// written notes how writing the bundle of this sequence ended.
func (f *bundleFile) written(sequence uint64, err error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	was := f.failing
	if err != nil {
		f.lacking = sequence
		if f.failing.err = err; was.err == nil {
			f.failing.since = f.now()
			f.log.Error("the bundle file cannot be written; it is tried until it can", "file", f.path, "sequence", sequence, "err", err)
		}
		return
	}
	f.failing = outage{}
	f.held = append(f.held, heldBundle{sequence, f.now()})
	f.held = f.held[max(0, len(f.held)-heldKept):]
	if was.err != nil {
		f.log.Info("the bundle file can be written again", "file", f.path, "sequence", sequence)
	}
}

// degraded says since when the file lacks the trust bundle, and whom that concerns; empty: it has it.
func (f *bundleFile) degraded() string {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.failing.err == nil {
		return ""
	}
	return fmt.Sprintf("the bundle file lacks trust bundle %d since %s: who reads it, and agents that were off, do not learn of it, and a new root waits for them; the last error: %v",
		f.lacking, f.failing.since.UTC().Format(time.RFC3339), f.failing.err)
}

// published is the file, and each of its readers, with since when it holds a bundle of this sequence or a later one.
func (f *bundleFile) published(set uint64) []rollout.Publication {
	f.mu.Lock()
	defer f.mu.Unlock()
	var since time.Time
	for _, h := range f.held {
		if h.sequence >= set {
			since = h.since
			break
		}
	}
	fault := errorText(f.failing.err)
	all := []rollout.Publication{{Reader: rollout.Reader{Name: "bundleFile"}, Since: since, Fault: fault}}
	for _, r := range f.readers {
		all = append(all, rollout.Publication{Reader: r, Since: since, Fault: fault})
	}
	return all
}

// openBundleFile makes the bundle file, where the configuration names one. Readers are then its readers; else they look
// elsewhere, and their time runs from when a root is published.
func (d *daemon) openBundleFile() (elsewhere []rollout.Reader) {
	var readers []rollout.Reader
	for _, r := range d.config.Readers {
		readers = append(readers, rollout.Reader{Name: r.Name, Refresh: r.Refresh.Duration})
	}
	if d.config.BundleFile == "" {
		return readers
	}
	d.bundleFile = &bundleFile{path: d.config.BundleFile, bundle: d.trust.Bundle, hold: d.mayTell, now: d.clock.Now, log: d.log, readers: readers}
	return nil
}

// mayTell says why the trust bundle must not be told: it is an old one, or has a root that must not come back.
func (d *daemon) mayTell() error {
	if err := d.continuity.Ready(); err != nil {
		return err
	}
	if _, err := d.returned(); err != nil {
		return refusal.New(refusal.BundleHeld, "%w", err).After(heldPatience)
	}
	signs := d.authority.Assignment().Root.ID
	bundle, _ := d.trust.Bundle()
	if !slices.ContainsFunc(bundle.X509Authorities(), func(c *x509.Certificate) bool { return ca.RootID(c) == signs }) {
		return nil // it has been taken out: another one is on its way in
	}
	if err := d.barred(signs); err != nil {
		return refusal.New(refusal.BundleHeld, "%w", err).After(heldPatience)
	}
	return nil
}

// heldPatience is when whoever may not be told is to ask again: most often a root that returned is out within seconds.
const heldPatience = 2 * time.Second

// returned finds a root of the trust bundle that was tainted, had left it, and is back by a backup, and says so; nil: there
// is none.
func (d *daemon) returned() (*x509.Certificate, error) {
	s, _ := d.roller.Standing()
	bundle, _ := d.trust.Bundle()
	for _, c := range bundle.X509Authorities() {
		if err := s.Rollout.Returned(rotation.Party{ID: ca.RootID(c), Key: ca.KeyOf(c)}); err != nil {
			return c, err
		}
	}
	return nil, nil
}

// published are the places that the CA writes the trust bundle to, for a rollout that has to wait for their readers.
func (d *daemon) published(set uint64) []rollout.Publication {
	var all []rollout.Publication
	if d.bundleFile != nil {
		all = d.bundleFile.published(set)
	}
	for _, name := range sortedNames(d.publishers) {
		all = append(all, d.publishers[name].Published(set)...)
	}
	return all
}
