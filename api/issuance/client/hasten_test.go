package client

import (
	"context"
	"errors"
	"net"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	meshcav1 "github.com/meshca/meshca/api/meshca/v1"
)

// Whoever calls does not find the connection asleep between two attempts; and a crowd of callers makes no more of them.
func TestACallEndsTheBackoff(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var dials atomic.Int64
		td := spiffeid.RequireTrustDomainFromString("mesh.test")
		c, err := New(Config{
			Address: "ca.test:8443", TrustDomain: td, Bundle: x509bundle.New(td),
			Dial: func(context.Context, string) (net.Conn, error) {
				dials.Add(1)
				return nil, errors.New("nobody there")
			},
		})
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		call := func() (made int64) {
			before := dials.Load()
			if _, err := c.AttestAgent(t.Context(), &meshcav1.AttestAgentRequest{}); err == nil {
				t.Error("answered by nobody")
			}
			synctest.Wait()
			return dials.Load() - before
		}
		call()
		time.Sleep(10 * time.Second) // its backoff has grown to about a second by now
		for before := dials.Load(); dials.Load() == before; time.Sleep(time.Millisecond) {
		}
		if made := call(); made != 1 {
			t.Errorf("%d attempts to connect were made for a call", made)
		}
		made := int64(0)
		for range 100 {
			made += call()
		}
		if made != 0 {
			t.Errorf("%d more at once for a hundred calls", made)
		}
	})
}
