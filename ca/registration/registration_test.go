package registration_test

import (
	"context"
	"crypto"
	"crypto/x509"
	"errors"
	"net/url"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"go.step.sm/crypto/pemutil"

	"github.com/meshca/meshca/api/refusal"
	"github.com/meshca/meshca/api/serial"
	"github.com/meshca/meshca/attestor"
	"github.com/meshca/meshca/attestor/kubernetes/localissuer"
	"github.com/meshca/meshca/ca"
	"github.com/meshca/meshca/ca/registration"
	"github.com/meshca/meshca/test/world"
)

func TestATokenBecomesAnSVID(t *testing.T) {
	w := world.New(t, "")
	svid, err := w.Issue(w.AttestAgent(world.Agent), world.Web)
	if err != nil {
		t.Fatal(err)
	}
	bundle, _ := w.Trust.Bundle()
	id, _, err := x509svid.Verify(svid.Chain, x509bundle.FromX509Authorities(world.TrustDomain, bundle.X509Authorities()))
	if err != nil {
		t.Fatal(err)
	}
	if want := "spiffe://mesh.test/ns/shop/sa/web"; id.String() != want {
		t.Errorf("issued %s, want %s", id, want)
	}
	line := w.Audit.Last(t)
	for key, want := range map[string]any{
		"msg": "issue", "outcome": "issued", "spiffeID": id.String(), "namespace": "shop", "serviceAccount": "web", "podUID": "pod-web-1",
		"nodeUID": "uid-node1", "caller": "spiffe://mesh.test/meshca/agent/one/node1", "proven": true, "serial": serial.String(svid.Chain[0].SerialNumber),
	} {
		if line[key] != want {
			t.Errorf("audit line: %s = %v, want %v", key, line[key], want)
		}
	}
	if found := w.Journal.Ring().ByPod("shop", "web-1", 5); len(found) != 1 || found[0].Outcome != registration.OutcomeIssued {
		t.Errorf("the ring remembers %+v", found)
	}
}

func TestRefusals(t *testing.T) {
	elsewhere := world.Web
	elsewhere.Node, elsewhere.NodeUID = "node2", "uid-node2"
	reborn := world.Web
	reborn.NodeUID = "uid-of-another-node1"
	notAnAgent := world.Agent
	notAnAgent.ServiceAccount = "default"

	tests := map[string]struct {
		rules   string
		caller  func(*world.World) registration.Caller
		request func(*world.World, *call)
		want    refusal.Reason
	}{
		"a pod on another node":           {request: func(w *world.World, r *call) { r.Token = w.Token(elsewhere, "meshca") }, want: refusal.PodNotOnNode},
		"a node of the same name":         {request: func(w *world.World, r *call) { r.Token = w.Token(reborn, "meshca") }, want: refusal.PodNotOnNode},
		"an agent's token for a workload": {request: func(w *world.World, r *call) { r.Token = w.Token(world.Web, "meshca-agent") }, want: refusal.TokenAudience},
		"an audience that is a prefix":    {request: func(w *world.World, r *call) { r.Token = w.Token(world.Web, "meshc") }, want: refusal.TokenAudience},
		"no token":                        {request: func(_ *world.World, r *call) { r.Token = attestor.NewToken("") }, want: refusal.TokenMissing},
		"an agent of another cluster":     {request: func(_ *world.World, r *call) { r.cluster = world.Twin }, want: refusal.ClusterMismatch},
		"an agent whose pod is gone": {request: func(w *world.World, _ *call) {
			w.Gone.Store(refusal.New(refusal.PodGone, "it is gone"))
		}, want: refusal.PodGone},
		"an agent that is no longer listed": {request: unlist, want: refusal.AgentNotListed},
		"a cluster name of a megabyte":      {request: func(_ *world.World, r *call) { r.cluster = strings.Repeat("x", 1<<20) }, want: refusal.ClusterUnknown},
		"an unknown cluster":                {request: func(_ *world.World, r *call) { r.cluster = "three" }, want: refusal.ClusterUnknown},
		"a life below nothing":              {request: func(_ *world.World, r *call) { r.TTL = -time.Second }, want: refusal.RequestMalformed},
		"no CSR":                            {request: func(_ *world.World, r *call) { r.CSR = nil }, want: refusal.CSRMalformed},
		"a DNS name that is not granted":    {request: asks(x509.CertificateRequest{DNSNames: []string{"web.shop"}}), want: refusal.CSRAsksMore},
		"another's URI":                     {request: asks(x509.CertificateRequest{URIs: []*url.URL{{Scheme: "spiffe", Host: "mesh.test", Path: "/ns/shop/sa/db"}}}), want: refusal.CSRAsksMore},
		"no client certificate":             {caller: func(*world.World) registration.Caller { return registration.Caller{Address: "192.0.2.9:9"} }, want: refusal.AgentRequired},
		"a foreign client certificate": {caller: func(*world.World) registration.Caller {
			return registration.Caller{Untrusted: x509.UnknownAuthorityError{}}
		}, want: refusal.CallerUntrusted},
		"an agent's SVID that has ended": {caller: func(w *world.World) registration.Caller {
			c := w.AttestAgent(world.Agent)
			c.NotAfter = time.Now()
			return c
		}, want: refusal.AgentExpired},
		"a serial that is not on record":    {caller: func(w *world.World) registration.Caller { c := w.AttestAgent(world.Agent); c.Serial = "00"; return c }, want: refusal.AgentUnknown},
		"a workload's SVID as an agent":     {caller: aWorkload, want: refusal.AgentUnknown},
		"policy without a rule that fits":   {rules: "rules: [{namespaces: [bank]}]", want: refusal.PolicyNoRule},
		"policy that denies":                {rules: "rules: [{name: closed, namespaces: [shop], deny: true}]", want: refusal.PolicyDenied},
		"the CA's own key":                  {request: withOwnKey, want: refusal.CSRKeyIsCA},
		"a denied identity":                 {request: denied("spiffe://mesh.test/ns/shop/sa/web"), want: refusal.IdentityDenied},
		"a denied agent":                    {request: denied("spiffe://mesh.test/meshca/agent/one/node1"), want: refusal.IdentityDenied},
		"a template that yields the agents": {rules: "rules: [{id: \"/{namespace}/agent/one/{serviceAccount}\"}]", request: inNamespace("meshca"), want: refusal.IdentityReserved},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			w := world.New(t, tt.rules)
			caller := w.AttestAgent(world.Agent)
			if tt.caller != nil {
				caller = tt.caller(w)
			}
			r := call{cluster: "one", Request: request(w)}
			if tt.request != nil {
				tt.request(w, &r)
			}
			ledger := ledgerSize(t, w)
			agent, err := w.RA.Admit(t.Context(), caller, r.cluster)
			if err != nil { // as the door does
				w.Journal.Refused(registration.EventCall, "grpc", caller, r.cluster, err)
			} else {
				_, err = w.RA.Issue(t.Context(), agent, r.Request)
			}
			if refusal.Of(err) != tt.want {
				t.Fatalf("got %v, want %s", err, tt.want)
			}
			if now := ledgerSize(t, w); now != ledger {
				t.Errorf("the ledger grew by %d entries: something was about to be signed", now-ledger)
			}
			line := w.Audit.Last(t)
			if line["outcome"] != string(tt.want) || line["message"] == "" {
				t.Errorf("audit line: %v", line)
			}
			if n := len(w.Audit.String()); n > 64<<10 {
				t.Errorf("the audit log has %d bytes", n)
			}
			if s := r.Token.Secret(); s != "" && strings.Contains(w.Audit.String(), s) {
				t.Error("the audit log holds a token")
			}
		})
	}
	t.Run("an agent that is not listed", func(t *testing.T) {
		w := world.New(t, "")
		err := attestWith(w, w.Token(notAnAgent, "meshca-agent"))
		if refusal.Of(err) != refusal.AgentNotListed {
			t.Fatalf("got %v", err)
		}
	})
	t.Run("a workload's token for an agent", func(t *testing.T) {
		w := world.New(t, "")
		err := attestWith(w, w.Token(world.Agent, "meshca"))
		if refusal.Of(err) != refusal.TokenAudience {
			t.Fatalf("got %v", err)
		}
	})
}

func TestTTLIsClampedToTheGrant(t *testing.T) {
	w := world.New(t, "rules: [{namespaces: [shop], serviceAccounts: [web], ttl: 1h}, {namespaces: [shop], ttl: 5m}]")
	agent, err := w.RA.Admit(t.Context(), w.AttestAgent(world.Agent), world.Cluster)
	if err != nil {
		t.Fatal(err)
	}
	brief := world.Web
	brief.ServiceAccount = "db"
	for _, c := range []struct {
		who         localissuer.Subject
		asked, want time.Duration
	}{
		{world.Web, 0, time.Hour},
		{world.Web, 9 * time.Hour, time.Hour},
		{world.Web, 20 * time.Minute, 20 * time.Minute},
		{world.Web, time.Minute, registration.MinAsked}, // each is an entry of the ledger
		{world.Web, time.Nanosecond, registration.MinAsked},
		{brief, time.Minute, 5 * time.Minute}, // what policy grants is policy's to say
		{brief, time.Hour, 5 * time.Minute},
	} {
		asked, want := c.asked, c.want
		r := request(w)
		r.Token, r.TTL = w.Token(c.who, registration.WorkloadAudience), asked
		svid, err := w.RA.Issue(t.Context(), agent, r)
		if err != nil {
			t.Fatal(err)
		}
		if svid.Life != want {
			t.Errorf("asked for %s: a life of %s, want %s", asked, svid.Life, want)
		}
	}
}

func TestAllowLiftsADenial(t *testing.T) {
	w := world.New(t, "")
	agent, id := w.AttestAgent(world.Agent), "spiffe://mesh.test/ns/shop/sa/web"
	_, stale := w.RA.Orders.Get()
	if _, err := w.RA.Orders.Deny(t.Context(), ca.Denial{ID: id, Since: time.Now(), By: "uid 0"}); err != nil {
		t.Fatal(err)
	}
	select {
	case <-stale:
	default:
		t.Error("who follows the orders was not woken")
	}
	if _, err := w.Issue(agent, world.Web); refusal.Of(err) != refusal.IdentityDenied {
		t.Fatalf("got %v", err)
	}
	again, err := registration.OpenOrders(t.Context(), w.Store, w.Store.ScanLiving)
	if err != nil {
		t.Fatal(err)
	}
	if _, ok := again.Denial(spiffeid.RequireFromString(id)); !ok {
		t.Error("the denial did not outlive the process")
	}
	if was, err := w.RA.Orders.Allow(t.Context(), id); err != nil || !was {
		t.Fatalf("allow: %v, %v", was, err)
	}
	if _, err := w.Issue(agent, world.Web); err != nil {
		t.Fatal(err)
	}
}

func TestAgentsOutliveTheProcess(t *testing.T) {
	w := world.New(t, "")
	agent := w.AttestAgent(world.Agent)
	w.RA.Agents.Connected(agent.ID, agent.Serial, "").Acknowledge(7, nil)
	if err := w.RA.Agents.Flush(t.Context()); err != nil {
		t.Fatal(err)
	}
	again, err := registration.OpenAgentBook(t.Context(), w.Store)
	if err != nil {
		t.Fatal(err)
	}
	w.RA.Agents = again
	if _, err := w.Issue(agent, world.Web); err != nil {
		t.Fatal(err)
	}
	if all := again.List(); len(all) != 1 || all[0].AckedSequence != 7 || all[0].Version != "v1" {
		t.Errorf("the book holds %+v", all)
	}
}

func TestAStrangerCannotMakeTheRingForget(t *testing.T) {
	w := world.New(t, "rules: [{namespaces: [bank]}]")
	agent := w.AttestAgent(world.Agent)
	if _, err := w.Issue(agent, world.Web); refusal.Of(err) != refusal.PolicyNoRule {
		t.Fatalf("got %v", err)
	}
	for range 300 {
		_ = attestWith(w, attestor.NewToken("made.up.token"))
	}
	if found := w.Journal.Ring().ByPod("shop", "web-1", 5); len(found) != 1 {
		t.Errorf("300 made-up tokens later the ring has %d decisions about the pod", len(found))
	}
}

// What step 1 refuses an agent is found under the agent's ID, and strangers cannot push it out.
func TestTheRingKnowsWhyAnAgentWasRefused(t *testing.T) {
	w := world.New(t, "")
	agent := w.AttestAgent(world.Agent)
	agent.Serial = "00"
	_, err := w.Issue(agent, world.Web)
	if refusal.Of(err) != refusal.AgentUnknown {
		t.Fatalf("got %v", err)
	}
	w.Journal.Refused(registration.EventCall, "grpc", agent, world.Cluster, err)
	for range 300 {
		_ = attestWith(w, attestor.NewToken("made.up.token"))
	}
	found := w.Journal.Ring().ByID(agent.ID.String(), 5)
	if len(found) == 0 || found[0].Outcome != string(refusal.AgentUnknown) {
		t.Errorf("the ring remembers %+v", found)
	}
}

func TestADeniedAgentCannotAttestItselfAnew(t *testing.T) {
	w := world.New(t, "")
	denied("spiffe://mesh.test/meshca/agent/one/node1")(w, nil)
	err := attestWith(w, w.Token(world.Agent, "meshca-agent"))
	if refusal.Of(err) != refusal.IdentityDenied || ledgerSize(t, w) != 0 {
		t.Fatalf("got %v, %d entries in the ledger", err, ledgerSize(t, w))
	}
}

func TestAnAgentThatCannotBeRecordedGetsNoSVID(t *testing.T) {
	w := world.New(t, "")
	store := &failing{AgentStore: w.Store}
	book, err := registration.OpenAgentBook(t.Context(), store)
	if err != nil {
		t.Fatal(err)
	}
	w.RA.Agents, store.err = book, errors.New("the disk is full")
	err = attestWith(w, w.Token(world.Agent, "meshca-agent"))
	if refusal.Of(err) != refusal.StoreUnavailable {
		t.Fatalf("got %v", err)
	}
}

// failing is a store that cannot write any more.
type failing struct {
	registration.AgentStore
	err error
}

func (f *failing) UpdateAgent(ctx context.Context, id string, change func(*ca.AgentRecord) error) error {
	if f.err != nil {
		return f.err
	}
	return f.AgentStore.UpdateAgent(ctx, id, change)
}

// slowly is an issuer that can be held up.
type slowly struct {
	registration.Issuer
	began, goOn chan struct{}
}

func (s *slowly) Issue(ctx context.Context, r ca.Request) (ca.SVID, error) {
	close(s.began)
	<-s.goOn
	return s.Issuer.Issue(ctx, r)
}

// What began before a denial may end in an SVID, but not after the one who denies was told that it stands: then the
// ledger has all that the identity ever got.
func TestDenyWaitsForWhatIsBeingIssued(t *testing.T) {
	w := world.New(t, "")
	agent := w.AttestAgent(world.Agent)
	slow := &slowly{w.Issuer, make(chan struct{}), make(chan struct{})}
	w.RA.Issuer = slow
	issued, denied := make(chan error, 1), make(chan uint64, 1)
	go func() {
		_, err := w.Issue(agent, world.Web)
		issued <- err
	}()
	<-slow.began
	go func() {
		if _, err := w.RA.Orders.Deny(t.Context(), ca.Denial{ID: "spiffe://mesh.test/ns/shop/sa/web", Since: time.Now()}); err != nil {
			t.Error(err)
		}
		size, err := w.Store.LedgerSize(t.Context())
		if err != nil {
			t.Error(err)
		}
		denied <- size
	}()
	_, stale := w.RA.Orders.Get()
	if _, ok := w.RA.Orders.Denial(spiffeid.RequireFromString("spiffe://mesh.test/ns/shop/sa/web")); !ok {
		<-stale
	}
	select {
	case <-denied:
		t.Error("Deny returned while an SVID of the identity was being made")
	case <-time.After(50 * time.Millisecond):
	}
	close(slow.goOn)
	if err := <-issued; err != nil {
		t.Errorf("what had begun: %v", err)
	}
	if size := <-denied; size != 2 { // the agent's and this one
		t.Errorf("the ledger had %d entries when Deny returned, want 2", size)
	}
}

func TestAgentsThatAreGoneAreForgotten(t *testing.T) {
	w := world.New(t, "")
	agent := w.AttestAgent(world.Agent)
	later := time.Now().Add(time.Hour)
	if err := w.RA.Agents.Forget(t.Context(), later); err != nil {
		t.Fatal(err)
	}
	if len(w.RA.Agents.List()) != 1 {
		t.Fatal("an agent whose SVID lives was forgotten")
	}
	err := w.Store.UpdateAgent(t.Context(), agent.ID.String(), func(r *ca.AgentRecord) error {
		r.Instances[0].NotAfter, r.HoldsUntil = time.Now(), time.Time{}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	book, err := registration.OpenAgentBook(t.Context(), w.Store)
	if err != nil {
		t.Fatal(err)
	}
	if err := book.Forget(t.Context(), later); err != nil {
		t.Fatal(err)
	}
	if again, err := registration.OpenAgentBook(t.Context(), w.Store); err != nil || len(again.List()) != 0 || len(book.List()) != 0 {
		t.Errorf("an agent that is gone is still on record: %v", err)
	}
}

// call is one request of one call.
type call struct {
	registration.Request
	cluster string
}

// request is a good one for world.Web.
func request(w *world.World) registration.Request {
	return registration.Request{Door: "grpc", Token: w.Token(world.Web, "meshca"), CSR: world.CSR(w.T, world.NewKey(w.T), x509.CertificateRequest{})}
}

// attestWith attests an agent from an address of a stranger.
func attestWith(w *world.World, token attestor.Token) error {
	_, err := w.RA.AttestAgent(w.T.Context(), registration.Caller{Address: "192.0.2.9:9"}, world.Cluster, "", registration.Request{
		Door: "grpc", Token: token, CSR: world.CSR(w.T, world.NewKey(w.T), x509.CertificateRequest{}),
	})
	return err
}

func aWorkload(w *world.World) registration.Caller {
	svid, err := w.Issue(w.AttestAgent(world.Agent), world.Web)
	if err != nil {
		w.T.Fatal(err)
	}
	return registration.Caller{ID: svid.ID, Serial: serial.String(svid.Chain[0].SerialNumber), NotAfter: svid.NotAfter}
}

// unlist takes the agent's service account off the cluster's list, as a restart with another configuration does.
func unlist(w *world.World, _ *call) {
	m := w.RA.Clusters[world.Cluster]
	m.Agents = []string{"meshca/another"}
	w.RA.Clusters[world.Cluster] = m
}

func asks(template x509.CertificateRequest) func(*world.World, *call) {
	return func(w *world.World, r *call) { r.CSR = world.CSR(w.T, world.NewKey(w.T), template) }
}

func inNamespace(ns string) func(*world.World, *call) {
	return func(w *world.World, r *call) {
		s := world.Web
		s.Namespace = ns
		r.Token = w.Token(s, "meshca")
	}
}

func denied(id string) func(*world.World, *call) {
	return func(w *world.World, _ *call) {
		if _, err := w.RA.Orders.Deny(context.Background(), ca.Denial{ID: id, Why: "a test", By: "uid 0", Since: time.Now()}); err != nil {
			w.T.Fatal(err)
		}
	}
}

// withOwnKey asks with the root's key.
func withOwnKey(w *world.World, r *call) {
	key, err := pemutil.Read(w.RootKey)
	if err != nil {
		w.T.Fatal(err)
	}
	r.CSR = world.CSR(w.T, key.(crypto.Signer), x509.CertificateRequest{})
}

func ledgerSize(t *testing.T, w *world.World) uint64 {
	t.Helper()
	n, err := w.Store.LedgerSize(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	return n
}
