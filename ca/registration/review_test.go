package registration_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/meshca/meshca/attestor"
	"github.com/meshca/meshca/attestor/kubernetes/localissuer"
	"github.com/meshca/meshca/ca"
	"github.com/meshca/meshca/ca/registration"
	"github.com/meshca/meshca/test/world"
)

const (
	webID  = "spiffe://mesh.test/ns/shop/sa/web"
	tillID = "spiffe://mesh.test/ns/shop/sa/till"
)

func till() localissuer.Subject {
	s := world.Web
	s.ServiceAccount, s.ServiceAccountUID, s.Pod, s.PodUID = "till", "sa-till", "till-1", "pod-till-1"
	return s
}

// reviewed holds what lives against the policy of now, and returns what the agent is told.
func reviewed(t *testing.T, w *world.World, agent spiffeid.ID) (registration.Reviewed, map[string]ca.RenewOrder) {
	t.Helper()
	sum, err := w.RA.Review(t.Context(), time.Now().Add(time.Second), w.Store.ScanLiving) // a second: the ledger's times are whole ones
	if err != nil {
		t.Fatal(err)
	}
	standing, _ := w.RA.Orders.Get()
	told := map[string]ca.RenewOrder{}
	for _, o := range standing.RenewBy(agent) {
		told[o.ID] = o
	}
	return sum, told
}

// Only what rests on rules that are no longer the first is asked for again: what may have ended at once, what certainly
// goes on under the same ID at leisure, and nothing else.
func TestReview(t *testing.T) {
	const before = `rules: [{name: tills, serviceAccounts: [till], ttl: 1h}, {name: gold, when: 'pod.labels.tier == "gold"'}, {name: rest, namespaces: [shop]}]`
	w := world.New(t, before)
	w.Facts.Store(&attestor.Facts{PodLabels: map[string]string{"tier": "gold"}})
	caller := w.AttestAgent(world.Agent)
	for _, s := range []localissuer.Subject{world.Web, till()} {
		if _, err := w.Issue(caller, s); err != nil {
			t.Fatal(err)
		}
	}
	for _, c := range []struct {
		name, rules      string
		web, till        time.Duration // the spread; zero: nothing is ordered
		doubted, altered int
	}{
		{"nothing", before, 0, 0, 0, 0},
		{"names and a rule for others", `rules: [{namespaces: [bank], deny: true}, {name: t, serviceAccounts: [till], ttl: 1h}, {name: g, when: 'pod.labels.tier == "gold"'}, {}]`, 0, 0, 0, 0},
		{"a rule behind", `rules: [{serviceAccounts: [till], ttl: 1h}, {when: 'pod.labels.tier == "gold"'}, {deny: true}]`, 0, 0, 0, 0},
		{"a deny for one", `rules: [{serviceAccounts: [till], deny: true}, {when: 'pod.labels.tier == "gold"'}, {}]`, 0, 2 * time.Second, 1, 0},
		{"a life for one", `rules: [{serviceAccounts: [till], ttl: 30m}, {when: 'pod.labels.tier == "gold"'}, {}]`, 0, 10 * time.Minute, 0, 1},
		{"an ID for one", `rules: [{serviceAccounts: [till], ttl: 1h, id: /t}, {when: 'pod.labels.tier == "gold"'}, {}]`, 0, 2 * time.Second, 1, 0},
		{"a condition", `rules: [{serviceAccounts: [till], ttl: 1h}, {when: 'pod.labels.tier == "silver"'}, {}]`, 2 * time.Second, 0, 1, 0},
		{"a condition before all", `rules: [{when: 'pod.labels.tier == "x"', deny: true}, {serviceAccounts: [till], ttl: 1h}, {when: 'pod.labels.tier == "gold"'}, {}]`, 2 * time.Second, 2 * time.Second, 2, 0},
		{"no rule that matches", `rules: [{namespaces: [bank]}]`, 2 * time.Second, 2 * time.Second, 2, 0},
		{"no rules", "rules: []", 10 * time.Minute, 10 * time.Minute, 0, 2},
		{"back", before, 0, 0, 0, 0},
	} {
		w.SetPolicy(c.rules)
		_, stale := w.RA.Orders.Get()
		sum, told := reviewed(t, w, caller.ID)
		if sum.Doubted != c.doubted || sum.Altered != c.altered || told[webID].Spread != c.web || told[tillID].Spread != c.till {
			t.Errorf("%s: %+v, told %+v", c.name, sum, told)
		}
		if _, others := reviewed(t, w, spiffeid.RequireFromString("spiffe://mesh.test/meshca/agent/one/node2")); len(others) > 0 {
			t.Errorf("%s: another agent is told %+v", c.name, others)
		}
		select {
		case <-stale:
		default:
			t.Errorf("%s: agents are not told that policy was looked at", c.name)
		}
		for id, o := range told {
			if o.IssuedBefore.After(time.Now()) || !o.Until.After(time.Now()) || o.ID != id {
				t.Errorf("%s: %+v", c.name, o)
			}
		}
	}
	// The agent's own SVID is none of policy's business.
	if standing, _ := w.RA.Orders.Get(); standing.Reviewed.IsZero() || len(standing.Reviews) > 0 || len(standing.Denials) > 0 {
		t.Errorf("%+v", standing)
	}
}

// A CA that was away while the policy changed finds it out, and a second start finds that it is done.
func TestReviewAtTheStart(t *testing.T) {
	w := world.New(t, "rules: [{ttl: 2h}]")
	caller := w.AttestAgent(world.Agent)
	if _, err := w.Issue(caller, world.Web); err != nil {
		t.Fatal(err)
	}
	w.SetPolicy("rules: [{id: '/new/{serviceAccount}', ttl: 2h}]")
	orders, err := registration.OpenOrders(t.Context(), w.Store, w.Store.ScanLiving)
	if err != nil {
		t.Fatal(err)
	}
	w.RA.Orders = orders
	if sum, told := reviewed(t, w, caller.ID); sum.Doubted != 1 || told[webID].ID == "" {
		t.Fatalf("%+v, told %+v", sum, told)
	}
	if _, err := w.Issue(caller, world.Web); err != nil {
		t.Fatal(err)
	}
	// The old ID's SVID lives in the ledger still; nobody holds it, and an order for it moves nobody.
	if sum, told := reviewed(t, w, caller.ID); sum.Doubted != 1 || len(told) != 1 || told[webID].ID == "" {
		t.Errorf("%+v, told %+v", sum, told)
	}
	// Under the same ID the newer one takes the place of the older one.
	w.SetPolicy("rules: [{id: '/new/{serviceAccount}', ttl: 1h}]")
	if sum, _ := reviewed(t, w, caller.ID); sum.Altered != 1 {
		t.Errorf("a shorter life: %+v", sum)
	}
	if _, err := w.Issue(caller, world.Web); err != nil {
		t.Fatal(err)
	}
	if sum, _ := reviewed(t, w, caller.ID); sum.Altered != 0 {
		t.Errorf("renewed under the policy of now: %+v", sum)
	}
	// But not where it came after the policy did: another socket of the pod may hold the older one.
	sum, err := w.RA.Review(t.Context(), time.Now().Add(-time.Minute), w.Store.ScanLiving)
	if err != nil || sum.Altered != 1 {
		t.Errorf("renewed since: %+v, %v", sum, err)
	}
}

// A pod's volumes share an ID and renew in their own time: that one has an SVID under the policy of now does not say that
// all have. Where the older one was replaced the order concerns nobody: it names the time until then alone.
func TestReviewOfTwoVolumes(t *testing.T) {
	w := world.New(t, "rules: [{namespaces: [shop]}]")
	caller := w.AttestAgent(world.Agent)
	issue(t, w, caller, world.Web)
	var now registration.LedgerEvidence
	if err := w.Store.ScanLedger(t.Context(), func(e ca.LedgerEntry) (bool, error) { return false, json.Unmarshal(e.Evidence, &now) }); err != nil {
		t.Fatal(err)
	}
	of := func(basis, way string) registration.LedgerEvidence {
		return registration.LedgerEvidence{Cluster: "one", Namespace: "shop", ServiceAccount: "web", PodUID: "p", Agent: caller.ID.String(), Basis: basis, Way: way}
	}
	const old = "00000000000000aa"
	for way, spread := range map[string]time.Duration{"": 10 * time.Minute, "nodeVouched": 2 * time.Second} { // the one that nothing grants any more
		short, long := entry(t, time.Minute, 10*time.Minute, webID, of(now.Basis, "")), entry(t, time.Hour, 6*time.Hour, webID, of(old, way))
		older := entry(t, 2*time.Hour, 3*time.Hour, webID, of(old, ""))
		sum, err := w.RA.Review(t.Context(), time.Now(), entries{short, long, older}.scan)
		standing, _ := w.RA.Orders.Get()
		orders := standing.RenewBy(caller.ID)
		if err != nil || sum != (registration.Reviewed{}) || len(orders) != 1 || orders[0].ID != webID || orders[0].Spread != spread ||
			!orders[0].IssuedBefore.After(long.IssuedAt) || orders[0].IssuedBefore.After(long.IssuedAt.Add(time.Second)) || !orders[0].Until.Equal(long.NotAfter) {
			t.Errorf("%q: %+v, told %+v, %v", way, sum, orders, err)
		}
	}
}

// What a change of policy meets on its way is found too: the decision was made before, the ledger's entry comes after.
func TestReviewWaitsForWhatIsBeingIssued(t *testing.T) {
	w := world.New(t, "rules: [{}]")
	caller := w.AttestAgent(world.Agent)
	slow := &slowly{w.Issuer, make(chan struct{}), make(chan struct{})}
	w.RA.Issuer = slow
	issued := make(chan error, 1)
	go func() {
		_, err := w.Issue(caller, world.Web)
		issued <- err
	}()
	<-slow.began
	w.SetPolicy("rules: [{deny: true}]")
	found := make(chan registration.Reviewed, 1)
	go func() {
		sum, err := w.RA.Review(t.Context(), time.Now(), w.Store.ScanLiving)
		if err != nil {
			t.Error(err)
		}
		found <- sum
	}()
	select {
	case sum := <-found:
		t.Errorf("the review ended before what began before it: %+v", sum)
	case <-time.After(50 * time.Millisecond):
	}
	close(slow.goOn)
	if err := <-issued; err != nil {
		t.Fatal(err)
	}
	if sum := <-found; sum.Doubted != 1 {
		t.Errorf("%+v", sum)
	}
}

// entries are a ledger that was made up, newest first.
type entries []ca.LedgerEntry

func (e entries) scan(_ context.Context, at time.Time, fn func(ca.LedgerEntry) (bool, error)) error {
	for _, x := range e {
		if !x.NotAfter.After(at) {
			continue
		}
		if more, err := fn(x); err != nil || !more {
			return err
		}
	}
	return nil
}

func entry(t *testing.T, age, life time.Duration, id string, v registration.LedgerEvidence) ca.LedgerEntry {
	t.Helper()
	js, err := json.Marshal(v)
	if err != nil {
		t.Fatal(err)
	}
	at := time.Now().Add(-age)
	return ca.LedgerEntry{ID: id, Profile: ca.ProfileWorkload, IssuedAt: at, NotAfter: at.Add(life), Evidence: js}
}

func TestReviewLooksAtWhatLives(t *testing.T) {
	w := world.New(t, "rules: [{namespaces: [bank], when: 'pod.labels.a == \"b\"'}, {namespaces: [shop], id: '/{serviceAccount}'}]")
	of := func(ns, sa, basis, agent string) registration.LedgerEvidence {
		return registration.LedgerEvidence{Cluster: "one", Namespace: ns, ServiceAccount: sa, PodUID: sa, Agent: agent, Basis: basis}
	}
	const agent, old = "spiffe://mesh.test/meshca/agent/one/node1", "00000000000000aa"
	for name, c := range map[string]struct {
		entry            ca.LedgerEntry
		doubted, altered int
	}{
		"it lives":                              {entry(t, time.Hour, 2*time.Hour, webID, of("shop", "web", old, agent)), 1, 0},
		"it has ended":                          {entry(t, time.Hour, time.Minute, webID, of("shop", "web", old, agent)), 0, 0},
		"the same ID, otherwise":                {entry(t, time.Hour, 2*time.Hour, "spiffe://mesh.test/web", of("shop", "web", old, agent)), 0, 1},
		"a workload got it itself":              {entry(t, time.Hour, 2*time.Hour, webID, of("shop", "web", old, "")), 0, 0},
		"of a version without basis, certain":   {entry(t, time.Hour, 2*time.Hour, webID, of("shop", "web", "", agent)), 1, 0},
		"of a version without basis, the same":  {entry(t, time.Hour, 2*time.Hour, "spiffe://mesh.test/web", of("shop", "web", "", agent)), 0, 0},
		"of a version without basis, uncertain": {entry(t, time.Hour, 2*time.Hour, webID, of("bank", "web", "", agent)), 0, 0},
		"uncertain":                             {entry(t, time.Hour, 2*time.Hour, webID, of("bank", "web", old, agent)), 1, 0},
		"vouched for, and no longer": {entry(t, time.Hour, 2*time.Hour, "spiffe://mesh.test/web", func() registration.LedgerEvidence {
			v := of("shop", "web", old, agent)
			v.Way = "nodeVouched"
			return v
		}()), 1, 0},
		"names that are none": {entry(t, time.Hour, 2*time.Hour, webID, of("shop", "", old, agent)), 1, 0},
	} {
		sum, err := w.RA.Review(t.Context(), time.Now(), entries{c.entry}.scan)
		if err != nil || sum.Doubted != c.doubted || sum.Altered != c.altered {
			t.Errorf("%s: %+v, %v", name, sum, err)
		}
	}
	// Entries before the longest life are not read.
	far := entry(t, ca.MaxTTL+time.Minute, time.Hour, webID, of("shop", "web", old, agent))
	broken := entry(t, ca.MaxTTL+time.Hour, time.Hour, webID, of("shop", "web", old, agent))
	broken.Evidence = []byte("{")
	if _, err := w.RA.Review(t.Context(), time.Now(), entries{far, broken}.scan); err != nil {
		t.Error(err)
	}
	// One that cannot be read, or a ledger, changes nothing that was ordered.
	standing, _ := w.RA.Orders.Get()
	broken.IssuedAt, broken.NotAfter = time.Now(), time.Now().Add(time.Hour)
	if _, err := w.RA.Review(t.Context(), time.Now(), entries{broken}.scan); err == nil {
		t.Error("an entry that cannot be read was read")
	}
	down := errors.New("the store is away")
	if _, err := w.RA.Review(t.Context(), time.Now(), func(context.Context, time.Time, func(ca.LedgerEntry) (bool, error)) error { return down }); !errors.Is(err, down) {
		t.Errorf("got %v", err)
	}
	if now, _ := w.RA.Orders.Get(); now != standing {
		t.Error("a review that failed changed what stands")
	}
}

// Many at once are spread by their number, and one agent is never told more than so many.
func TestReviewOfMany(t *testing.T) {
	w := world.New(t, "rules: [{deny: true}]")
	const agents, each = 12, 1000
	var all entries
	for a := range agents {
		for i := range each {
			sa := fmt.Sprintf("sa-%d", i)
			all = append(all, entry(t, time.Hour, 2*time.Hour, "spiffe://mesh.test/ns/shop/sa/"+sa, registration.LedgerEvidence{
				Cluster: "one", Namespace: "shop", ServiceAccount: sa, PodUID: sa, Agent: fmt.Sprintf("spiffe://mesh.test/meshca/agent/one/n%d", a), Basis: "00000000000000aa",
			}))
		}
	}
	sum, err := w.RA.Review(t.Context(), time.Now(), all.scan)
	if err != nil || sum.Doubted != agents*each || sum.Within != 6*time.Second {
		t.Errorf("%+v, %v", sum, err)
	}
	standing, _ := w.RA.Orders.Get()
	if len(standing.Reviews) != agents {
		t.Fatalf("%d agents are told", len(standing.Reviews))
	}
	for agent, orders := range standing.Reviews {
		if len(orders) != 1 || orders[0].ID != "" || orders[0].Spread != sum.Within {
			t.Errorf("%s is told %d orders, the first %+v", agent, len(orders), orders[0])
		}
	}
}

// An operator's orders and a review's do not undo each other.
func TestReviewsStandBesideOrders(t *testing.T) {
	w := world.New(t, "rules: [{}]")
	caller := w.AttestAgent(world.Agent)
	if _, err := w.Issue(caller, world.Web); err != nil {
		t.Fatal(err)
	}
	w.SetPolicy("rules: [{deny: true}]")
	if err := w.RA.Orders.Renew(t.Context(), ca.RenewOrder{IssuedBefore: time.Now(), Until: time.Now().Add(time.Hour)}); err != nil {
		t.Fatal(err)
	}
	reviewed(t, w, caller.ID)
	denied(tillID)(w, nil)
	if _, err := w.RA.Orders.Allow(t.Context(), tillID); err != nil {
		t.Fatal(err)
	}
	if err := w.RA.Orders.Renew(t.Context(), ca.RenewOrder{ID: tillID, IssuedBefore: time.Now(), Until: time.Now().Add(time.Hour)}); err != nil {
		t.Fatal(err)
	}
	standing, _ := w.RA.Orders.Get()
	if got := standing.RenewBy(caller.ID); len(got) != 3 || len(standing.Renew) != 2 || len(standing.Denials) != 0 {
		t.Errorf("%+v", got)
	}
	again, err := registration.OpenOrders(t.Context(), w.Store, w.Store.ScanLiving)
	if err != nil {
		t.Fatal(err)
	}
	if s, _ := again.Get(); len(s.Reviews) != 0 || len(s.Renew) != 2 {
		t.Errorf("stored: %+v", s)
	}
}
