package main

import (
	"context"
	"testing"
	"testing/synctest"
	"time"

	"github.com/meshca/meshca/ca"
	"github.com/meshca/meshca/ca/rollout"
)

// What `certctl policy test --file` needs to answer as this CA would.
func TestStatusTellsWhatPoliciesAreReadFor(t *testing.T) {
	dir := t.TempDir()
	one, two := clusterIn(t, dir, "one", false), clusterIn(t, dir, "two", false)
	c := configIn(t, dir, one, two)
	c.SVID.TTL.Duration = time.Hour
	s, err := opened(t, c).status(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if s.GetMaxSvidTtl().AsDuration() != time.Hour {
		t.Errorf("SVIDs of at most %v, want an hour", s.GetMaxSvidTtl().AsDuration())
	}
	for _, k := range s.GetClusters() {
		if !k.GetSameNamespaces() {
			t.Errorf("cluster %s: its sameNamespaces is not told", k.GetName())
		}
	}
	if len(s.GetClusters()) != 2 {
		t.Errorf("%d clusters", len(s.GetClusters()))
	}
}

// While two intermediates sign, as for a share, each has a renewal of its own.
func TestStatusTellsWhenEachIntermediateIsRenewed(t *testing.T) {
	dir := t.TempDir()
	synctest.Test(t, func(t *testing.T) {
		d := opened(t, configIn(t, dir, clusterIn(t, dir, "a", false)))
		ctx, stop := context.WithCancel(t.Context())
		kept := make(chan struct{})
		go func() { defer close(kept); d.keepLines(ctx, func() {}) }()
		defer func() { stop(); <-kept }()
		time.Sleep(time.Hour)
		second, err := d.upstream.(rollout.Maker).NewIssuer(ctx)
		if err == nil {
			err = d.trust.AddRoots(ctx, second.Root)
		}
		if err != nil {
			t.Fatal(err)
		}
		both := d.authority.Assignment()
		both.Successor, both.Share = ca.Root{ID: ca.RootID(second.Root), Ref: second.Ref}, 5
		d.authority.Assign(both)
		time.Sleep(time.Hour)
		synctest.Wait()
		shown := 0
		for _, a := range d.ownAuthorities() {
			if a.GetKind() != "intermediate" {
				continue
			}
			shown++
			began, end := a.GetNotBefore().AsTime(), a.GetNotAfter().AsTime()
			if half := began.Add(end.Sub(began) / 2); a.GetRenewAt().AsTime().Sub(half).Abs() > 10*time.Minute { // its beginning is set back
				t.Errorf("%s: from %s to %s, and it is to be renewed at %s", a.GetState(), began, end, a.GetRenewAt().AsTime())
			}
		}
		if shown != 2 {
			t.Errorf("%d intermediates are shown, want two", shown)
		}
		d.authority.Assign(ca.Assignment{Root: both.Successor})
		synctest.Wait()
		n := 0
		d.attempts.Range(func(any, any) bool { n++; return true })
		if n != 1 {
			t.Errorf("%d attempts are kept, and one intermediate is", n)
		}
	})
}
