package registration_test

import (
	"slices"
	"testing"

	"github.com/meshca/meshca/api/refusal"
	"github.com/meshca/meshca/ca/registration"
	"github.com/meshca/meshca/test/world"
)

// Who was refused before policy granted an ID is asked about by the ID that he would have had.
func TestTheRingFindsRefusalsByThePlainID(t *testing.T) {
	w := world.New(t, "rules: [{name: closed, namespaces: [shop], deny: the shop is closed}]")
	agent := w.AttestAgent(world.Agent)
	if _, err := w.Issue(agent, world.Web); refusal.Of(err) != refusal.PolicyDenied {
		t.Fatalf("got %v", err)
	}
	moved := world.Web
	moved.Node, moved.NodeUID = "node2", "uid-node2"
	if _, err := w.Issue(agent, moved); refusal.Of(err) != refusal.PodNotOnNode {
		t.Fatalf("got %v", err)
	}
	outcomes := func(id string) []string {
		var all []string
		for _, d := range w.Journal.Ring().ByID(id, 10) {
			all = append(all, d.Outcome)
		}
		return all
	}
	for id, want := range map[string][]string{
		"spiffe://mesh.test/ns/shop/sa/web":   {string(refusal.PodNotOnNode), string(refusal.PolicyDenied)},
		"spiffe://mesh.test/ns/shop/sa/cart":  nil,
		"spiffe://mesh.test/ns/web/sa/shop":   nil,
		"spiffe://mesh.test/shop/web":         nil,
		"spiffe://mesh.test/ns/shop/sa/web/x": nil,
		// The agent's own: its attestation, and not what it asked for others.
		agent.ID.String(): {registration.OutcomeIssued},
		"not an ID":       nil,
	} {
		if got := outcomes(id); !slices.Equal(got, want) {
			t.Errorf("%s: %v, want %v", id, got, want)
		}
	}
}
