package issuance_test

import (
	"context"
	"crypto/tls"
	"fmt"
	"net"
	"strings"
	"testing"
	"time"

	"golang.org/x/net/http2"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/meshca/meshca/api/issuance"
	meshcav1 "github.com/meshca/meshca/api/meshca/v1"
	"github.com/meshca/meshca/api/refusal"
	"github.com/meshca/meshca/test/world"
)

// halfSent opens a call over a connection of its own, and never sends its message.
func (d *door) halfSent(cert *tls.Certificate, method string) grpc.ClientStream {
	d.t.Helper()
	ctx, cancel := context.WithTimeout(d.t.Context(), 20*time.Second)
	d.t.Cleanup(cancel)
	g, err := d.connect(cert).NewStream(ctx, &grpc.StreamDesc{ClientStreams: true}, method)
	if err != nil {
		d.t.Fatal(err)
	}
	return g
}

func patience(p time.Duration) func(*issuance.Server, *world.World) {
	return func(s *issuance.Server, _ *world.World) { s.SetPatience(p) }
}

// What has come of a message is kept until the rest comes, and anybody can open such calls.
func TestAMessageHasItsTimeToArrive(t *testing.T) {
	for who, method := range map[string]string{
		"stranger": meshcav1.IssuanceService_AttestAgent_FullMethodName, "agent": meshcav1.IssuanceService_IssueX509SVIDs_FullMethodName,
	} {
		t.Run(who, func(t *testing.T) {
			d := newDoor(t, issuance.Limits{OpenCallsWithoutSVID: 8}, patience(300*time.Millisecond)) // one of an address
			var cert *tls.Certificate
			if who == "agent" {
				cert = d.attest()
			}
			if err := d.halfSent(cert, method).RecvMsg(&meshcav1.AttestAgentResponse{}); status.Code(err) != codes.Unavailable {
				t.Fatalf("it ended with %v, and not with its connection", err)
			}
			eventually(t, "its audit line", func() bool {
				line := d.Audit.Last(t)
				return line["outcome"] == string(refusal.PeerLimit) && line["message"] == "a call's message did not arrive within 300ms; its connection is closed"
			})
			eventually(t, "its place to be free", func() bool {
				_, err := d.dial(nil).AttestAgent(t.Context(), &meshcav1.AttestAgentRequest{Cluster: world.Cluster})
				return refusal.Of(err) == refusal.TokenMissing && d.server.Arriving() == 0
			})
		})
	}
}

// A call that is answered late had its message in time.
func TestACallThatArrivedIsNotHastened(t *testing.T) {
	const limit = 300 * time.Millisecond
	d := newDoor(t, issuance.Limits{}, patience(limit), within(2*limit, time.Hour, time.Hour), func(_ *issuance.Server, w *world.World) {
		w.RA.Issuer = hanging{w.Issuer}
	})
	cert := d.attest()
	answer, err := d.dial(cert).IssueX509SVIDs(t.Context(), &meshcav1.IssueX509SVIDsRequest{Cluster: world.Cluster, Requests: []*meshcav1.X509SVIDRequest{d.item()}})
	if err != nil || answer.GetResults()[0].GetRefusal().GetReason() != string(refusal.CallEnded) {
		t.Errorf("answered %v, %v", answer, err)
	}
	stream := d.sync(cert, hello())
	if _, err := stream.Recv(); err != nil {
		t.Fatal(err)
	}
	time.Sleep(2 * limit)
	if err := stream.Context().Err(); err != nil {
		t.Errorf("a stream that said hello: %v", err)
	}
}

func TestHalfSentMessagesAreBounded(t *testing.T) {
	t.Run("of one address", func(t *testing.T) {
		d := newDoor(t, issuance.Limits{OpenCallsWithoutSVID: 32}, patience(time.Hour))
		for range 2 {
			d.halfSent(nil, meshcav1.IssuanceService_AttestAgent_FullMethodName)
		}
		eventually(t, "the refusal", func() bool {
			_, err := d.dial(nil).AttestAgent(t.Context(), &meshcav1.AttestAgentRequest{Cluster: world.Cluster})
			return refusal.Of(err) == refusal.PeerLimit && strings.Contains(err.Error(), "a sixteenth of openCallsWithoutSVID")
		})
	})
	t.Run("of strangers together", func(t *testing.T) {
		d := newDoor(t, issuance.Limits{OpenCallsWithoutSVID: 32}, patience(time.Hour))
		var conns []net.Conn
		for pod := range 16 {
			for range 2 { // as many as one address may have
				conn := d.handshake(nil, fmt.Sprintf("127.0.6.%d", 1+pod))
				beginCall(t, conn, http2.NewFramer(conn, nil))
				conns = append(conns, conn)
			}
		}
		if !ends(t, conns[0]) {
			t.Error("the first of the half-sent calls stays: none gives way")
		}
		eventually(t, "somebody who says what he wants to be heard", func() bool {
			_, err := d.dial(nil).AttestAgent(t.Context(), &meshcav1.AttestAgentRequest{Cluster: world.Cluster})
			return refusal.Of(err) == refusal.TokenMissing
		})
	})
	t.Run("of agents together", func(t *testing.T) {
		d := newDoor(t, issuance.Limits{OpenMessages: 2}, patience(time.Hour))
		cert := d.attest()
		for range 2 {
			d.halfSent(cert, meshcav1.IssuanceService_IssueX509SVIDs_FullMethodName)
		}
		eventually(t, "them to be seen", func() bool { return d.server.Arriving() == 2 })
		_, err := d.dial(cert).IssueX509SVIDs(t.Context(), &meshcav1.IssueX509SVIDsRequest{Cluster: world.Cluster})
		if refusal.Of(err) != refusal.Overloaded {
			t.Errorf("one more: %v", err)
		}
		if _, err := d.dial(nil).AttestAgent(t.Context(), &meshcav1.AttestAgentRequest{Cluster: world.Cluster}); refusal.Of(err) != refusal.TokenMissing {
			t.Errorf("an agent that attests itself: %v", err)
		}
	})
	t.Run("streams of one agent", func(t *testing.T) {
		d := newDoor(t, issuance.Limits{})
		cert := d.attest()
		for range 4 {
			if _, err := d.sync(cert, hello()).Recv(); err != nil {
				t.Fatal(err)
			}
		}
		if _, err := d.sync(cert, hello()).Recv(); refusal.Of(err) != refusal.PeerLimit {
			t.Errorf("one more: %v", err)
		}
	})
}

// With nothing set, what strangers and agents leave half sent, messages and handshakes, stays well below the memory that
// the chart gives a CA: 1 GiB.
func TestWhatHalfSentMessagesCanHold(t *testing.T) {
	strangers, agents := issuance.HalfSent()
	if all := strangers + agents; strangers > 288<<20 || all > 672<<20 {
		t.Errorf("strangers can hold %d MiB, all %d MiB", strangers>>20, all>>20)
	}
}
