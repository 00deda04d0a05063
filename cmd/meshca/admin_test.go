package main

import (
	"testing"
	"time"
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
