package rollout_test

import (
	"context"
	"errors"
	"maps"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/meshca/meshca/ca"
	"github.com/meshca/meshca/ca/rollout"
)

// listing is an upstream whose list of issuers is edited.
type listing struct {
	ca.Upstream
	edit *atomic.Pointer[func([]ca.UpstreamIssuer) ([]ca.UpstreamIssuer, error)]
}

func (l listing) Issuers(ctx context.Context) ([]ca.UpstreamIssuer, error) {
	issuers, err := l.Upstream.Issuers(ctx)
	if edit := l.edit.Load(); err == nil && edit != nil {
		return (*edit)(issuers)
	}
	return issuers, err
}

func (l listing) NewIssuer(ctx context.Context) (ca.UpstreamIssuer, error) {
	return l.Upstream.(rollout.Maker).NewIssuer(ctx)
}

// What would become of an intermediate is told with what hinders, and nothing is replaced for it.
func TestIntermediatesArePlanned(t *testing.T) {
	t.Parallel()
	h := newHouse(t)
	var edit atomic.Pointer[func([]ca.UpstreamIssuer) ([]ca.UpstreamIssuer, error)]
	h.wrap = func(u ca.Upstream) ca.Upstream { return listing{u, &edit} }
	h.stop()
	h.open()
	defer h.run()()
	h.eventually("an intermediate", func() bool { return len(h.serials()) == 1 })
	before := h.serials()
	elsewhere := anchor(t, nil, nil)
	for name, c := range map[string]struct {
		edit func([]ca.UpstreamIssuer) ([]ca.UpstreamIssuer, error)
		// life is the new one's, at most; a fault has none.
		life time.Duration
		says string
	}{
		"all is well": {nil, h.auth.Life(), ""},
		"the issuer ends": {func(all []ca.UpstreamIssuer) ([]ca.UpstreamIssuer, error) {
			all[0].NotAfter = time.Now().Add(10 * time.Hour)
			return all, nil
		}, 10 * time.Hour, ""},
		"it ends too soon": {func(all []ca.UpstreamIssuer) ([]ca.UpstreamIssuer, error) {
			all[0].NotAfter = time.Now()
			return all, nil
		}, 0, "too soon to issue under it"},
		"the upstream fails": {func([]ca.UpstreamIssuer) ([]ca.UpstreamIssuer, error) { return nil, errors.New("sealed") }, 0, "could not be asked for its issuers: sealed"},
		"the issuer is gone": {func([]ca.UpstreamIssuer) ([]ca.UpstreamIssuer, error) { return nil, nil }, 0, "has no issuer " + h.auth.Assignment().Root.Ref + " any more"},
		"it has a fault": {func(all []ca.UpstreamIssuer) ([]ca.UpstreamIssuer, error) {
			all[0].Fault = errors.New("no key")
			return all, nil
		}, 0, "cannot be used: no key"},
		"it is another one": {func(all []ca.UpstreamIssuer) ([]ca.UpstreamIssuer, error) { all[0].Root = elsewhere; return all, nil }, 0, "leads to another root"},
	} {
		edit.Store(nil)
		if c.edit != nil {
			edit.Store(&c.edit)
		}
		from := time.Now()
		plans := h.operator.PlanIntermediates(t.Context())
		to := time.Now()
		if len(plans) != 1 || plans[0].Line.Root != h.auth.Assignment().Root || len(plans[0].Line.Chain) == 0 {
			t.Fatalf("%s: %+v", name, plans)
		}
		p := plans[0]
		switch {
		case c.says != "":
			if p.Fault == nil || !strings.Contains(p.Fault.Error(), c.says) || !p.NotAfter.IsZero() {
				t.Errorf("%s: until %s, %v, want %q", name, p.NotAfter, p.Fault, c.says)
			}
		case p.Fault != nil, p.NotAfter.Before(from.Add(c.life)), p.NotAfter.After(to.Add(c.life)):
			t.Errorf("%s: until %s, %v", name, p.NotAfter, p.Fault)
		}
	}
	edit.Store(nil)
	h.rotate(50)
	h.eventually("the share", func() bool { return h.auth.Assignment().Share == 50 })
	if plans := h.operator.PlanIntermediates(t.Context()); len(plans) != 2 || plans[0].Fault != nil || plans[1].Fault != nil || plans[0].Line.Root == plans[1].Line.Root {
		t.Errorf("in a canary: %+v", plans)
	}
	why := errors.New("tainted, and it stays so")
	lines, _ := h.auth.Lines()
	lines[0].Bar(why)
	if plans := h.operator.PlanIntermediates(t.Context()); len(plans) != 2 || !errors.Is(plans[0].Fault, why) || plans[1].Fault != nil {
		t.Errorf("one is barred: %+v", plans)
	}
	after := h.serials()
	maps.DeleteFunc(after, func(root, _ string) bool { return before[root] == "" })
	if !maps.Equal(before, after) || h.agents.orders() != 0 {
		t.Errorf("it was %v, and is %v; %d orders to renew", before, after, h.agents.orders())
	}
}
