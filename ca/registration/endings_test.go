package registration_test

import (
	"context"
	"crypto/x509"
	"log/slog"
	"slices"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/meshca/meshca/api/refusal"
	"github.com/meshca/meshca/api/serial"
	"github.com/meshca/meshca/attestor/kubernetes/localissuer"
	"github.com/meshca/meshca/ca"
	"github.com/meshca/meshca/ca/registration"
	"github.com/meshca/meshca/test/world"
)

func serialOf(s ca.SVID) string { return serial.String(s.Chain[0].SerialNumber) }

// issue issues, or fails the test.
func issue(t *testing.T, w *world.World, c registration.Caller, s localissuer.Subject) string {
	t.Helper()
	svid, err := w.Issue(c, s)
	if err != nil {
		t.Fatal(err)
	}
	return serialOf(svid)
}

// watchCauses runs until the test ends, or the function that it returns is called.
func watchCauses(t *testing.T, w *world.World) (stop func()) {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan struct{})
	go func() { defer close(done); w.RA.WatchCauses(ctx, w.Store.ScanLiving, slog.New(slog.DiscardHandler)) }()
	stop = func() { cancel(); <-done }
	t.Cleanup(stop)
	return stop
}

// told waits until the agent is told of so many endings.
func told(t *testing.T, w *world.World, agent spiffeid.ID, n int) []registration.Ending {
	t.Helper()
	late := time.After(20 * time.Second)
	for {
		endings, stale := w.RA.Endings.Of(agent)
		if len(endings) == n {
			return endings
		}
		select {
		case <-stale:
		case <-late:
			t.Fatalf("the agent is told of %d endings, want %d", len(endings), n)
		}
	}
}

// What a pod was given ends with the pod: its agent is told, all of it and nothing else, and the audit log and the ring know.
func TestIdentitiesEndWithTheirCause(t *testing.T) {
	w := world.New(t, "")
	caller := w.AttestAgent(world.Agent)
	first, second := issue(t, w, caller, world.Web), issue(t, w, caller, world.Web)
	issue(t, w, caller, till())
	watchCauses(t, w)
	w.Ends.Store(world.Web.PodUID, refusal.New(refusal.PodGone, "pod shop/web-1 does not exist"))
	endings := told(t, w, caller.ID, 1)
	got := slices.Sorted(slices.Values(endings[0].Serials))
	if want := slices.Sorted(slices.Values([]string{first, second})); !slices.Equal(got, want) || endings[0].Why.Reason != refusal.PodGone || !endings[0].Until.After(time.Now()) {
		t.Errorf("told %+v, want the serials %v", endings[0], want)
	}
	if others, _ := w.RA.Endings.Of(spiffeid.RequireFromString("spiffe://mesh.test/meshca/agent/one/node2")); len(others) > 0 {
		t.Errorf("another agent is told %+v", others)
	}
	eventually(t, func() bool { return w.Audit.Last(t)["msg"] == "end" })
	line := w.Audit.Last(t)
	for key, want := range map[string]any{
		"level": "INFO", "outcome": "POD_GONE", "spiffeID": webID, "namespace": "shop", "serviceAccount": "web", "pod": "web-1", "podUID": "pod-web-1",
		"nodeUID": "uid-node1", "agent": caller.ID.String(), "caller": nil, "serial": second, "cluster": "one", "message": "pod shop/web-1 does not exist", "ms": nil,
	} {
		if line[key] != want {
			t.Errorf("audit line: %s = %v, want %v", key, line[key], want)
		}
	}
	for _, found := range [][]registration.Decision{w.Journal.Ring().ByPod("shop", "web-1", 1), w.Journal.Ring().ByID(webID, 1)} {
		if len(found) != 1 || found[0].Event != registration.EventEnd || found[0].Outcome != "POD_GONE" {
			t.Errorf("the ring remembers %+v", found)
		}
	}
	if held, told := w.RA.Endings.Count(); held != 1 || told != 1 {
		t.Errorf("%d are held, %d told", held, told)
	}
	n := len(w.Audit.Lines(t))
	time.Sleep(1500 * time.Millisecond) // another look
	if more := len(w.Audit.Lines(t)); more != n {
		t.Errorf("%d lines more about what is known", more-n)
	}
}

func eventually(t *testing.T, met func() bool) {
	t.Helper()
	for end := time.Now().Add(20 * time.Second); !met(); time.Sleep(10 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatal("never")
		}
	}
}

// A CA that starts again knows from its ledger what lives, and so hears of what ended while it was away.
func TestWhatEndedWhileTheCAWasAway(t *testing.T) {
	w := world.New(t, "")
	caller := w.AttestAgent(world.Agent)
	first, second := issue(t, w, caller, world.Web), issue(t, w, caller, world.Web)
	issue(t, w, caller, till())
	w.RA.Endings = registration.NewEndings()
	w.Ends.Store(world.Web.PodUID, refusal.New(refusal.ServiceAccountGone, "it was deleted"))
	watchCauses(t, w)
	endings := told(t, w, caller.ID, 1)
	if !slices.Equal(endings[0].Serials, []string{second, first}) || endings[0].Why.Reason != refusal.ServiceAccountGone {
		t.Errorf("told %+v, want %v", endings[0], []string{second, first})
	}
	if held, _ := w.RA.Endings.Count(); held != 1 {
		t.Errorf("%d are held", held)
	}
}

// A pod has a volume as it comes and a second one with a short life, which is renewed every few minutes: all that lives of
// both ends, and it is known after a start too.
func TestASecondVolumeHidesNothing(t *testing.T) {
	w := world.New(t, "")
	caller := w.AttestAgent(world.Agent)
	long := issue(t, w, caller, world.Web)
	admitted, err := w.RA.Admit(t.Context(), caller, world.Cluster)
	if err != nil {
		t.Fatal(err)
	}
	short := func(n int) (serial string) {
		for range n {
			svid, err := w.RA.Issue(t.Context(), admitted, registration.Request{
				Door: "grpc", TTL: 10 * time.Minute, Token: w.Token(world.Web, registration.WorkloadAudience), CSR: world.CSR(t, world.NewKey(t), x509.CertificateRequest{}),
			})
			if err != nil {
				t.Fatal(err)
			}
			serial = serialOf(svid)
		}
		return serial
	}
	last := short(registration.DefaultSVIDsPerPod - 1)
	stop := watchCauses(t, w)
	w.Ends.Store(world.Web.PodUID, refusal.New(refusal.ServiceAccountGone, "service account shop/web does not exist"))
	endings := told(t, w, caller.ID, 1)
	if s := endings[0].Serials; !slices.Contains(s, long) || s[0] != last {
		t.Errorf("%d serials are told, and not what lives longest, or not the newest first", len(s))
	}
	stop()
	w.RA.Endings = registration.NewEndings()
	watchCauses(t, w)
	if s := told(t, w, caller.ID, 1)[0].Serials; !slices.Contains(s, long) || s[0] != last {
		t.Errorf("after a start: %d serials are told, and not what lives longest, or not the newest first", len(s))
	}
}

// What was attested before the end and issued after it ends at the next look, beside what ended before.
func TestIssuedAfterTheEnd(t *testing.T) {
	w := world.New(t, "")
	caller := w.AttestAgent(world.Agent)
	issue(t, w, caller, world.Web)
	w.Ends.Store(world.Web.PodUID, refusal.New(refusal.PodGone, "gone"))
	watchCauses(t, w)
	told(t, w, caller.ID, 1)
	late := issue(t, w, caller, world.Web)
	if endings := told(t, w, caller.ID, 2); !slices.Contains(endings[1].Serials, late) {
		t.Errorf("told %+v, want %s", endings[1], late)
	}
}

// The same pod under an account that was made anew is another holder: the end of the one is not the end of the other.
func TestAnAccountMadeAnew(t *testing.T) {
	w := world.New(t, "")
	caller := w.AttestAgent(world.Agent)
	issue(t, w, caller, world.Web)
	w.Ends.Store(world.Web.PodUID, refusal.New(refusal.ServiceAccountGone, "another one"))
	stop := watchCauses(t, w)
	told(t, w, caller.ID, 1)
	stop()
	w.Ends.Clear()
	anew := world.Web
	anew.ServiceAccountUID = "sa-web-anew"
	issue(t, w, caller, anew)
	watchCauses(t, w)
	time.Sleep(1500 * time.Millisecond)
	if endings, _ := w.RA.Endings.Of(caller.ID); len(endings) != 1 {
		t.Errorf("told %+v", endings)
	}
}

// A workload that got its SVID itself has no agent that could be told.
func TestNobodyIsToldOfWhatWasIssuedDirectly(t *testing.T) {
	e := registration.NewEndings()
	ledger := entries{
		entry(t, time.Minute, time.Hour, webID, registration.LedgerEvidence{Cluster: "one", Namespace: "shop", ServiceAccount: "web", Pod: "web-1", PodUID: "u", Node: "n", NodeUID: "n"}),
		entry(t, time.Minute, time.Second, webID, registration.LedgerEvidence{Agent: "a", Cluster: "one", Namespace: "shop", ServiceAccount: "web", Pod: "web-1", PodUID: "u", Node: "n", NodeUID: "n"}),
		entry(t, time.Minute, time.Hour, webID, registration.LedgerEvidence{Agent: "a", Cluster: "one", Namespace: "shop", ServiceAccount: "web", Pod: "", PodUID: "u", Node: "n", NodeUID: "n"}),
	}
	if err := e.Recall(t.Context(), ledger.scan); err != nil {
		t.Fatal(err)
	}
	if held, _ := e.Count(); held != 0 {
		t.Errorf("%d are held", held)
	}
}
