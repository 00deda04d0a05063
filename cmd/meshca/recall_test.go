package main

import (
	"encoding/json"
	"slices"
	"testing"
	"time"

	"github.com/meshca/meshca/ca"
	"github.com/meshca/meshca/ca/registration"
)

// What was issued through an agent in the moments before a crash is in the ledger alone: the agent counts by it.
func TestAStartRecallsWhatACrashForgot(t *testing.T) {
	dir := t.TempDir()
	c := configIn(t, dir, clusterIn(t, dir, "a", false))
	d := opened(t, c)
	const agent = "spiffe://mesh.test/meshca/agent/a/node1"
	if err := d.store.UpdateAgent(t.Context(), agent, func(r *ca.AgentRecord) error { r.ID, r.Cluster = agent, "a"; return nil }); err != nil {
		t.Fatal(err)
	}
	evidence, err := json.Marshal(registration.LedgerEvidence{Agent: agent})
	if err != nil {
		t.Fatal(err)
	}
	now := time.Now()
	entry := ca.LedgerEntry{Serial: []byte{1}, Profile: "workload", IssuedAt: now, NotAfter: now.Add(time.Hour), Evidence: evidence}
	if err := d.ledger.Append(t.Context(), entry); err != nil {
		t.Fatal(err)
	}
	if err := d.close(); err != nil {
		t.Fatal(err)
	}
	if names := opened(t, c).agents.Unconfirmed(2, now.Add(time.Minute)); !slices.Equal(names, []string{agent}) {
		t.Errorf("those that count are %q", names)
	}
}
