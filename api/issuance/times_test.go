package issuance_test

import (
	"context"
	"sync/atomic"
	"testing"
	"time"

	"github.com/meshca/meshca/api/issuance"
	meshcav1 "github.com/meshca/meshca/api/meshca/v1"
	"github.com/meshca/meshca/api/refusal"
	"github.com/meshca/meshca/ca"
	"github.com/meshca/meshca/ca/registration"
	"github.com/meshca/meshca/test/world"
)

// within sets the door's times; an hour is never, in a test.
func within(answer, hello, recheck time.Duration) func(*issuance.Server, *world.World) {
	return func(s *issuance.Server, _ *world.World) { s.SetTimes(answer, hello, recheck) }
}

func hello() *meshcav1.SyncRequest {
	return &meshcav1.SyncRequest{Message: &meshcav1.SyncRequest_Hello{Hello: &meshcav1.SyncHello{Cluster: world.Cluster}}}
}

// hanging is an issuer behind a store that does not answer any more, once the agents have their SVIDs.
type hanging struct{ registration.Issuer }

func (h hanging) Issue(ctx context.Context, r ca.Request) (ca.SVID, error) {
	if r.Profile == ca.ProfileAgent {
		return h.Issuer.Issue(ctx, r)
	}
	<-ctx.Done()
	return ca.SVID{}, ctx.Err()
}

func TestACallIsAnsweredInTime(t *testing.T) {
	d := newDoor(t, issuance.Limits{}, within(200*time.Millisecond, time.Hour, time.Hour), func(_ *issuance.Server, w *world.World) {
		w.RA.Issuer = hanging{w.Issuer}
	})
	agent := d.dial(d.attest())
	for n := range 3 {
		r := &meshcav1.IssueX509SVIDsRequest{Cluster: world.Cluster}
		for range n + 1 {
			r.Requests = append(r.Requests, d.item())
		}
		answer, err := agent.IssueX509SVIDs(t.Context(), r)
		if err != nil {
			t.Fatal(err)
		}
		for _, result := range answer.GetResults() {
			if no := result.GetRefusal(); no.GetReason() != string(refusal.CallEnded) || no.GetRetryAfter() == nil {
				t.Errorf("of %d requests, one was answered %v", n+1, result)
			}
		}
	}
}

func TestASilentStreamEnds(t *testing.T) {
	d := newDoor(t, issuance.Limits{}, within(time.Hour, 50*time.Millisecond, time.Hour))
	if _, err := d.sync(d.attest()).Recv(); refusal.Of(err) != refusal.RequestMalformed {
		t.Errorf("got %v", err)
	}
}

// Nobody orders anything and no bundle changes: the stream of an agent whose pod is gone ends all the same.
func TestTheAgentBehindAStreamIsLookedAtAgain(t *testing.T) {
	d := newDoor(t, issuance.Limits{}, within(time.Hour, time.Hour, 20*time.Millisecond))
	stream := d.sync(d.attest(), hello())
	if _, err := stream.Recv(); err != nil {
		t.Fatal(err)
	}
	d.Gone.Store(refusal.New(refusal.PodGone, "the pod is gone"))
	if _, err := stream.Recv(); refusal.Of(err) != refusal.PodGone {
		t.Errorf("got %v", err)
	}
}

func TestAStreamEndsWithItsSVID(t *testing.T) {
	d := newDoor(t, issuance.Limits{}, within(time.Hour, time.Hour, time.Hour), func(_ *issuance.Server, w *world.World) {
		w.RA.AgentTTL = ca.MinTTL
	})
	stream := d.sync(d.attest(), hello())
	if _, err := stream.Recv(); err != nil {
		t.Fatal(err)
	}
	if _, err := stream.Recv(); refusal.Of(err) != refusal.AgentExpired {
		t.Errorf("got %v", err)
	}
}

// Nothing changes but the clock: agents are told what it says, for they judge by it what they hold.
func TestAClockThatIsSetIsTold(t *testing.T) {
	var back atomic.Int64
	d := newDoor(t, issuance.Limits{}, within(time.Hour, time.Hour, 20*time.Millisecond), func(s *issuance.Server, _ *world.World) {
		s.SetWall(func() time.Time { return time.Now().Add(-time.Duration(back.Load())) })
	})
	stream := d.sync(d.attest(), hello())
	if _, err := stream.Recv(); err != nil {
		t.Fatal(err)
	}
	told := make(chan error)
	go func() {
		_, err := stream.Recv()
		told <- err
	}()
	select {
	case err := <-told:
		t.Fatalf("a state came, and nothing has changed (%v)", err)
	case <-time.After(200 * time.Millisecond):
	}
	back.Store(int64(2 * time.Hour))
	if err := <-told; err != nil {
		t.Errorf("the clock was set back: %v", err)
	}
}
