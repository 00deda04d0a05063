package issuance_test

import (
	"testing"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/meshca/meshca/api/issuance"
	meshcav1 "github.com/meshca/meshca/api/meshca/v1"
	"github.com/meshca/meshca/api/refusal"
	"github.com/meshca/meshca/test/world"
)

// Connections cost memory, and whoever shows no SVID can open them: agents are not to be without for that.
func TestConnectionsOfStrangersAreBounded(t *testing.T) {
	for name, test := range map[string]struct {
		limit  int
		reason refusal.Reason
	}{
		"of one address": {24, refusal.PeerLimit}, // three
		"of all":         {1, refusal.Overloaded},
	} {
		t.Run(name, func(t *testing.T) {
			d := newDoor(t, issuance.Limits{ConnectionsWithoutSVID: test.limit})
			ask := func(c meshcav1.IssuanceServiceClient) error {
				_, err := c.AttestAgent(t.Context(), &meshcav1.AttestAgentRequest{Cluster: world.Cluster})
				return err
			}
			first := d.connect(nil)
			if err := ask(meshcav1.NewIssuanceServiceClient(first)); refusal.Of(err) != refusal.TokenMissing {
				t.Fatalf("the first: %v", err)
			}
			cert := d.attestOver(first)
			for range max(1, test.limit/8) - 1 {
				if err := ask(d.dial(nil)); refusal.Of(err) != refusal.TokenMissing {
					t.Fatalf("within the bound: %v", err)
				}
			}
			if err := ask(d.dial(nil)); status.Code(err) != codes.Unavailable {
				t.Errorf("one more: %v", err)
			}
			eventually(t, "its audit line", func() bool { return d.Audit.Last(t)["outcome"] == string(test.reason) })
			for range 8 {
				if _, err := d.sync(cert, hello()).Recv(); err != nil && refusal.Of(err) != refusal.PeerLimit { // it has four streams
					t.Fatalf("an agent: %v", err)
				}
			}
			if err := first.Close(); err != nil {
				t.Fatal(err)
			}
			eventually(t, "a place", func() bool { return refusal.Of(ask(d.dial(nil))) == refusal.TokenMissing })
		})
	}
}
