package kubesigner

import (
	"net/http"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/meshca/meshca/api/refusal"
	"github.com/meshca/meshca/ca"
)

// undelivered is a bench with a request that was signed for, and an API server that took no answer. try makes the next try.
func undelivered(t *testing.T) (b *bench, it *item, try func() error, heal func()) {
	t.Helper()
	b = newBench(t, "v1beta1")
	var failing atomic.Bool
	failing.Store(true)
	b.before = func(w http.ResponseWriter, r *http.Request) bool {
		away := failing.Load() && strings.HasSuffix(r.URL.Path, "/status")
		if away {
			failure(w, http.StatusInternalServerError, "InternalError", "etcdserver: request timed out")
		}
		return away
	}
	d := b.signer.doors[0]
	if _, err := d.look(t.Context()); err != nil {
		t.Fatal(err)
	}
	b.ask("one")
	it = &item{}
	try = func() error { return d.try(t.Context(), objectKey{"shop", "one"}, it) }
	if err := try(); err == nil || b.signed() != 1 || it.made == nil {
		t.Fatalf("%v, signed %d times", err, b.signed())
	}
	return b, it, try, func() { failing.Store(false) }
}

func (b *bench) ends(kind, reason string, signed int) {
	b.t.Helper()
	if k, r := b.condition("one"); k != kind || r != reason || b.signed() != signed {
		b.t.Errorf("it is %q (%s) and was signed %d times, want %s (%s) and %d", k, r, b.signed(), kind, reason, signed)
	}
}

// What was signed and could not be delivered is delivered for 90 seconds, and not later.
func TestWhatWasSignedIsDeliveredForAWhile(t *testing.T) {
	for age, signed := range map[time.Duration]int{80 * time.Second: 1, 91 * time.Second: 2} {
		b, it, try, heal := undelivered(t)
		it.made.at = it.made.at.Add(-age)
		heal()
		if err := try(); err != nil {
			t.Fatal(err)
		}
		b.ends("Issued", "Issued", signed)
	}
}

// Nor is it when it would not be granted any more.
func TestWhatIsNotGrantedAnyMoreIsNotDelivered(t *testing.T) {
	for name, c := range map[string]struct {
		change       func(b *bench)
		kind, reason string
		signed       int
	}{
		"it is denied": {func(b *bench) {
			denial := ca.Denial{ID: "spiffe://mesh.test/ns/shop/sa/web", Since: time.Now(), By: "uid 0", Why: "stolen"}
			if _, err := b.RA.Orders.Deny(b.t.Context(), denial); err != nil {
				b.t.Fatal(err)
			}
		}, "Denied", "IDENTITY_DENIED", 1},
		"policy denies":          {func(b *bench) { b.SetPolicy("rules: [{deny: true}]") }, "Denied", "POLICY_DENIED", 1},
		"policy grants less":     {func(b *bench) { b.SetPolicy("rules: [{ttl: 2h}]") }, "Issued", "Issued", 2},
		"it is granted as ever":  {func(b *bench) { b.SetPolicy("rules: [{name: all}]") }, "Issued", "Issued", 1},
		"it cannot be asked now": {func(b *bench) { b.Unknown.Store(refusal.New(refusal.KubernetesUnavailable, "it is away")) }, "", "", 1},
	} {
		t.Run(name, func(t *testing.T) {
			b, it, try, heal := undelivered(t)
			c.change(b)
			heal()
			if err := try(); err != nil != (c.kind == "") {
				t.Errorf("%v", err)
			}
			b.ends(c.kind, c.reason, c.signed)
			if c.kind == "" && it.made == nil {
				t.Error("what was signed is lost to a fault that passes")
			}
		})
	}
}
