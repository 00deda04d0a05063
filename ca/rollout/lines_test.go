package rollout_test

import (
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/meshca/meshca/api/refusal"
	"github.com/meshca/meshca/ca"
	"github.com/meshca/meshca/ca/rollout"
	"github.com/meshca/meshca/rotation"
)

// moody signs for some issuers and not for others.
type moody struct {
	ca.Upstream
	first string // the root's reference that the house begins with
	mood  *atomic.Pointer[string]
}

// What it refuses to sign for.
var (
	nobody     = ""
	theFirst   = "the first root"
	thatComing = "the other ones"
)

func (m moody) SignIntermediate(ctx context.Context, ref string, r ca.IntermediateRequest) ([]*x509.Certificate, error) {
	if mood := *m.mood.Load(); mood == theFirst && ref == m.first || mood == thatComing && ref != m.first {
		return nil, errors.New("the upstream does not sign for it now")
	}
	return m.Upstream.SignIntermediate(ctx, ref, r)
}

func (m moody) NewIssuer(ctx context.Context) (ca.UpstreamIssuer, error) {
	return m.Upstream.(rollout.Maker).NewIssuer(ctx)
}

// onMoody is a house whose upstream has moods.
func onMoody(t *testing.T) (h *house, mood func(*string)) {
	t.Helper()
	h = newHouse(t)
	var now atomic.Pointer[string]
	now.Store(&nobody)
	first := h.auth.Assignment().Root.Ref
	h.wrap = func(u ca.Upstream) ca.Upstream { return moody{u, first, &now} }
	h.stop()
	h.open()
	return h, func(m *string) { now.Store(m) }
}

// serials are those of the intermediates, by their roots.
func (h *house) serials() map[string]string {
	all := map[string]string{}
	lines, _ := h.auth.Lines()
	for _, l := range lines {
		if chain := l.Status().Chain; len(chain) > 0 {
			all[l.Root().ID] = fmt.Sprintf("%x", chain[0].SerialNumber)
		}
	}
	return all
}

// The intermediates' keys are stolen while the upstream signs below one root and not below another one. What is replaced has
// all renewed; what signs and is not replaced is an error, and what signs for nobody yet is none.
func TestAStolenIntermediateBesideALineThatFails(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		canary int
		refuse *string
		orders int
		says   string
	}{
		"a root that comes waits for its first one": {0, &thatComing, 1, ""},
		"the canary's is not replaced":              {50, &thatComing, 1, "what is replaced signs already, and all that was issued is ordered"},
		"the canary's alone is replaced":            {50, &theFirst, 1, "what is replaced signs already, and all that was issued is ordered"},
		"the one that signs is not replaced":        {0, &theFirst, 0, "is not replaced"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			h, mood := onMoody(t)
			defer h.run()()
			if c.canary == 0 {
				mood(&thatComing)
				h.rotate(0)
				h.at(rotation.StepConfirmed)
				h.eventually("a line that fails", func() bool {
					lines, _ := h.auth.Lines()
					return len(lines) == 2 && lines[1].Status().LastError != nil
				})
			} else {
				h.rotate(c.canary)
				h.eventually("the share", func() bool { return h.auth.Assignment().Share == c.canary })
			}
			mood(c.refuse)
			if c.refuse == &theFirst && c.canary == 0 {
				_, err := h.operator.Abort(t.Context(), "test") // a line alone
				h.must(err)
				h.at(rotation.StepOut)
			}
			before := h.serials()
			ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
			defer cancel()
			until, err := h.operator.RotateIntermediate(ctx, time.Minute)
			if c.says == "" && err != nil || c.says != "" && (err == nil || !strings.Contains(err.Error(), c.says)) {
				t.Errorf("it says %v, want %q", err, c.says)
			}
			if n := h.agents.orders(); n != c.orders || until.IsZero() {
				t.Errorf("%d orders to renew were given, want %d; trusted until %s", n, c.orders, until)
			}
			for root, serial := range h.serials() {
				kept := c.refuse == &theFirst == (root == h.auth.Assignment().Root.ID)
				if (serial == before[root]) != kept {
					t.Errorf("below %s it was %s, and is %s", root, before[root], serial)
				}
			}
			if mood(&nobody); c.says == "" {
				return // the rollout goes on
			}
			if _, err := h.operator.RotateIntermediate(ctx, time.Minute); err != nil || h.agents.orders() <= c.orders {
				t.Errorf("the command again: %v; %d orders", err, h.agents.orders())
			}
		})
	}
}

// The upstream does not sign when the intermediate's theft is told. What the stolen key signed is renewed when it does, by
// itself, once, and by another process too.
func TestAStolenIntermediateWhileTheUpstreamIsAway(t *testing.T) {
	t.Parallel()
	for name, restart := range map[string]bool{"the process goes on": false, "another process goes on": true} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			h, mood := onMoody(t)
			stop := h.run()
			defer func() { stop() }()
			before := h.serials()
			lines, _ := h.auth.Lines()
			end := lines[0].Status().NotAfter
			mood(&theFirst)
			ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
			defer cancel()
			until, err := h.operator.RotateIntermediate(ctx, time.Minute)
			if err == nil || !strings.Contains(err.Error(), "all that was issued is ordered to be renewed then, also if the CA starts again before") || !until.Equal(end) {
				t.Errorf("trusted until %s, want %s; it says %v", until, end, err)
			}
			if h.agents.orders() != 0 {
				t.Errorf("%d orders before it is replaced", h.agents.orders())
			}
			mood(&nobody)
			if restart {
				stop()
				h.stop()
				h.open()
				stop = h.run()
			}
			root := h.auth.Assignment().Root.ID
			h.eventually("it is replaced by itself", func() bool { return h.serials()[root] != "" && h.serials()[root] != before[root] })
			h.eventually("what it signed is renewed", func() bool { return h.agents.orders() == 1 })
			h.eventually("nothing is owed", func() bool { r, err := h.roller.Record(t.Context()); return err == nil && len(r.Owed) == 0 })
			if h.agents.renewed[0] != time.Minute {
				t.Errorf("spread over %s", h.agents.renewed[0])
			}
		})
	}
}

// A line that nobody keeps says why at once, and what signs beside it is replaced.
func TestALineThatIsBarred(t *testing.T) {
	t.Parallel()
	h := newHouse(t)
	lines, _ := h.auth.Lines()
	why := refusal.New(refusal.RootTainted, "nothing is signed under it")
	lines[0].Bar(why)
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	if _, err := h.operator.RotateIntermediate(ctx, time.Minute); !errors.Is(err, why) || ctx.Err() != nil || h.agents.orders() != 0 || !strings.Contains(err.Error(), "is not while this stands") {
		t.Errorf("it says %v, want %v at once; orders: %v", err, why, h.agents.renewed)
	}
}

// A root that is tainted while it waits for its first intermediate has no line behind that: nobody is asked to sign for it.
func TestALineOfATaintedSuccessorGoes(t *testing.T) {
	t.Parallel()
	h, mood := onMoody(t)
	defer h.run()()
	mood(&thatComing)
	r := h.rotate(0)
	h.at(rotation.StepConfirmed)
	h.eventually("its line", func() bool { lines, _ := h.auth.Lines(); return len(lines) == 2 })
	h.taint(r.New.ID)
	h.at(rotation.StepOut)
	if lines, _ := h.auth.Lines(); len(lines) != 1 || lines[0].Root().ID != r.Old.ID {
		t.Errorf("%d lines: one below a root that was tainted, and is out, is kept", len(lines))
	}
}
