package registration_test

import (
	"crypto/x509"
	"encoding/json"
	"slices"
	"testing"

	"github.com/meshca/meshca/api/refusal"
	"github.com/meshca/meshca/attestor"
	"github.com/meshca/meshca/attestor/kubernetes/localissuer"
	"github.com/meshca/meshca/ca"
	"github.com/meshca/meshca/ca/policy"
	"github.com/meshca/meshca/ca/registration"
	"github.com/meshca/meshca/test/world"
)

var stranger = registration.Caller{Address: "192.0.2.9:9"}

const directForWeb = "rules: [{serviceAccounts: [web], direct: true}, {}]"

func TestDirect(t *testing.T) {
	w := world.New(t, directForWeb)
	by, err := w.RA.AdmitDirect(stranger, world.Cluster)
	if err != nil {
		t.Fatal(err)
	}
	svid, err := w.RA.Issue(t.Context(), by, request(w))
	if err != nil || svid.ID.Path() != "/ns/shop/sa/web" {
		t.Fatalf("%s, %v", svid.ID, err)
	}
	line, evidence := w.Audit.Last(t), newest(t, w)
	if line["way"] != "direct" || line["outcome"] != "issued" || line["caller"] != nil && line["caller"] != "" || line["peer"] != stranger.Address {
		t.Errorf("audit line: %v", line)
	}
	if evidence.Way != "direct" || evidence.Agent != "" || evidence.Pod != "web-1" || evidence.Method != "kubernetes/jwks" || policy.ParseBasis(evidence.Basis) == 0 {
		t.Errorf("the ledger's evidence: %+v", evidence)
	}
	// With an agent it is no other than before.
	if _, err := w.Issue(w.AttestAgent(world.Agent), world.Web); err != nil || newest(t, w).Way != "" || w.Audit.Last(t)["way"] != "" && w.Audit.Last(t)["way"] != nil {
		t.Errorf("through an agent: %v, %+v", err, newest(t, w))
	}
}

func TestDirectIsRefused(t *testing.T) {
	aside := world.Web
	aside.ServiceAccount = "till"
	for name, c := range map[string]struct {
		rules   string
		caller  func(*world.World) registration.Caller
		request func(*world.World, *registration.Request)
		want    refusal.Reason
	}{
		"no rule opens the way":          {rules: "rules: [{}]", want: refusal.AgentRequired},
		"no rule at all":                 {want: refusal.AgentRequired},
		"a rule of another cluster does": {rules: "rules: [{clusters: [two], direct: true}, {}]", want: refusal.AgentRequired},
		"not for this account": {rules: directForWeb, want: refusal.DirectNotAllowed, request: func(w *world.World, r *registration.Request) {
			r.Token = w.Token(aside, "meshca")
		}},
		"a condition that does not hold": {rules: "rules: [{when: 'node.name == \"node9\"', direct: true}, {}]", want: refusal.DirectNotAllowed},
		"an agent's token":               {rules: directForWeb, want: refusal.TokenAudience, request: func(w *world.World, r *registration.Request) { r.Token = w.Token(world.Agent, "meshca-agent") }},
		"no token":                       {rules: directForWeb, want: refusal.TokenMissing, request: func(_ *world.World, r *registration.Request) { r.Token = attestor.NewToken("") }},
		"a pod's name for a token": {rules: "rules: [{direct: true, nodeVouched: true}]", want: refusal.NodeVouchedNotAllowed, request: func(_ *world.World, r *registration.Request) {
			r.Token, r.Pod = attestor.NewToken(""), &attestor.PodRef{Namespace: "shop", Name: "web-1", UID: "pod-web-1"}
		}},
		"a denied identity": {rules: directForWeb, want: refusal.IdentityDenied, request: func(w *world.World, _ *registration.Request) {
			denied("spiffe://mesh.test/ns/shop/sa/web")(w, nil)
		}},
		"a workload's own SVID": {rules: directForWeb, caller: aWorkload, want: refusal.AgentUnknown},
		"a foreign client certificate": {rules: directForWeb, caller: func(*world.World) registration.Caller {
			return registration.Caller{Untrusted: x509.UnknownAuthorityError{}}
		}, want: refusal.CallerUntrusted},
	} {
		t.Run(name, func(t *testing.T) {
			w := world.New(t, c.rules)
			caller, r := stranger, request(w)
			if c.caller != nil {
				caller = c.caller(w)
			}
			if c.request != nil {
				c.request(w, &r)
			}
			before := ledgerSize(t, w)
			by, err := w.RA.AdmitDirect(caller, world.Cluster)
			if err == nil {
				_, err = w.RA.Issue(t.Context(), by, r)
			}
			if refusal.Of(err) != c.want || ledgerSize(t, w) != before {
				t.Errorf("got %v, want %s", err, c.want)
			}
		})
	}
}

var webPod = attestor.PodRef{Namespace: "shop", Name: "web-1", UID: "pod-web-1"}

// known is a world that knows the pod of a subject without its token.
func known(t *testing.T, rules string, s localissuer.Subject) *world.World {
	t.Helper()
	w := world.New(t, rules)
	id, err := attestor.NewIdentity(world.Cluster, s.Namespace, s.ServiceAccount)
	if err != nil {
		t.Fatal(err)
	}
	w.Pods.Store(webPod, attestor.Evidence{
		Proven: true, Vouched: true, Identity: id, Method: "kubernetes/nodeVouched", ServiceAccountUID: s.ServiceAccountUID,
		PodName: s.Pod, PodUID: s.PodUID, NodeName: s.Node, NodeUID: s.NodeUID,
	})
	return w
}

func vouchedFor(w *world.World) registration.Request {
	r := request(w)
	r.Token, r.Pod = attestor.NewToken(""), &webPod
	return r
}

func TestNodeVouched(t *testing.T) {
	w := known(t, "rules: [{namespaces: [shop], nodeVouched: true}]", world.Web)
	agent, err := w.RA.Admit(t.Context(), w.AttestAgent(world.Agent), world.Cluster)
	if err != nil {
		t.Fatal(err)
	}
	svid, err := w.RA.Issue(t.Context(), agent, vouchedFor(w))
	if err != nil || svid.ID.Path() != "/ns/shop/sa/web" {
		t.Fatalf("%s, %v", svid.ID, err)
	}
	line, evidence := w.Audit.Last(t), newest(t, w)
	if line["way"] != "nodeVouched" || line["method"] != "kubernetes/nodeVouched" || line["podUID"] != "pod-web-1" || line["caller"] == "" {
		t.Errorf("audit line: %v", line)
	}
	if evidence.Way != "nodeVouched" || evidence.Method != "kubernetes/nodeVouched" || evidence.PodUID != "pod-web-1" || evidence.Agent == "" {
		t.Errorf("the ledger's evidence: %+v", evidence)
	}
}

func TestNodeVouchedIsRefused(t *testing.T) {
	elsewhere := world.Web
	elsewhere.Node, elsewhere.NodeUID = "node1", "uid-of-another-node1"
	both := func(w *world.World, r *registration.Request) { r.Token = w.Token(world.Web, "meshca") }
	for name, c := range map[string]struct {
		rules   string
		pod     localissuer.Subject
		request func(*world.World, *registration.Request)
		want    refusal.Reason
		asked   int64 // how often the cluster was
	}{
		"no rules":              {rules: "", pod: world.Web, want: refusal.NodeVouchedNotAllowed, asked: 1},
		"no rule opens it":      {rules: "rules: [{direct: true}]", pod: world.Web, want: refusal.NodeVouchedNotAllowed, asked: 1},
		"for another namespace": {rules: "rules: [{namespaces: [bank], nodeVouched: true}, {}]", pod: world.Web, want: refusal.NodeVouchedNotAllowed, asked: 1},
		"denied":                {rules: "rules: [{namespaces: [bank], nodeVouched: true}, {deny: true}]", pod: world.Web, want: refusal.PolicyDenied, asked: 1},
		"a pod on another node": {rules: "rules: [{nodeVouched: true}]", pod: elsewhere, want: refusal.PodNotOnNode, asked: 1},
		"a token too":           {rules: "rules: [{nodeVouched: true}]", pod: world.Web, request: both, want: refusal.RequestMalformed},
		"a pod that nobody knows": {rules: "rules: [{nodeVouched: true}]", pod: world.Web, want: refusal.NodeVouchedNotAllowed, asked: 1, request: func(_ *world.World, r *registration.Request) {
			r.Pod = &attestor.PodRef{Namespace: "shop", Name: "web-1", UID: "other"}
		}},
		"a pod with a path for it": {rules: "rules: [{nodeVouched: true}]", pod: world.Web, want: refusal.RequestMalformed, asked: 1, request: func(_ *world.World, r *registration.Request) {
			r.Pod = &attestor.PodRef{Namespace: "shop/..", Name: "x", UID: "u"}
		}},
	} {
		t.Run(name, func(t *testing.T) {
			w := known(t, c.rules, c.pod)
			agent, err := w.RA.Admit(t.Context(), w.AttestAgent(world.Agent), world.Cluster)
			if err != nil {
				t.Fatal(err)
			}
			r := vouchedFor(w)
			if c.request != nil {
				c.request(w, &r)
			}
			before := ledgerSize(t, w)
			_, err = w.RA.Issue(t.Context(), agent, r)
			if refusal.Of(err) != c.want || ledgerSize(t, w) != before || w.Vouched.Load() != c.asked {
				t.Errorf("got %v after %d questions, want %s after %d", err, w.Vouched.Load(), c.want, c.asked)
			}
			line := w.Audit.Last(t)
			if line["way"] != "nodeVouched" || line["outcome"] != string(c.want) {
				t.Errorf("audit line: %v", line)
			}
			if c.request == nil && (line["namespace"] != "shop" || line["pod"] != "web-1" || line["serviceAccount"] != "web") {
				t.Errorf("the audit line does not say whose the pod is: %v", line)
			}
		})
	}
}

// What conditions see is the attested pod, and what is not known is no reason for anything but another try.
func TestConditionsSeeTheAttestedPod(t *testing.T) {
	w := world.New(t, `rules: [{name: gold, when: 'pod.labels.tier == "gold" && pod.name == "web-1" && node.name == "node1" && ns.labels.env == "live"', id: '/gold/{serviceAccount}'}, {}]`)
	agent := w.AttestAgent(world.Agent)
	for name, c := range map[string]struct {
		facts *attestor.Facts
		path  string
		want  refusal.Reason
	}{
		"gold":       {&attestor.Facts{PodLabels: map[string]string{"tier": "gold"}, NamespaceLabels: map[string]string{"env": "live"}}, "/gold/web", ""},
		"tin":        {&attestor.Facts{PodLabels: map[string]string{"tier": "tin"}, NamespaceLabels: map[string]string{"env": "live"}}, "/ns/shop/sa/web", ""},
		"no label":   {&attestor.Facts{PodLabels: map[string]string{}, NamespaceLabels: map[string]string{"env": "live"}}, "", refusal.PolicyError},
		"not known":  {&attestor.Facts{NamespaceLabels: map[string]string{"env": "live"}}, "", refusal.PolicyFactsUnknown},
		"no facts":   {nil, "", refusal.PolicyFactsUnknown},
		"far larger": {&attestor.Facts{NamespaceLabels: map[string]string{"env": "live"}, TooLarge: attestor.Wants{PodLabels: true}}, "", refusal.PolicyError},
	} {
		w.Facts.Store(c.facts)
		svid, err := w.Issue(agent, world.Web)
		if refusal.Of(err) != c.want || svid.ID.Path() != c.path {
			t.Errorf("%s: %s, %v; want %q %s", name, svid.ID, err, c.path, c.want)
		}
	}
	if line := w.Audit.String(); len(line) == 0 || slices.ContainsFunc(w.Audit.Lines(t), func(l map[string]any) bool { return l["labels"] != nil }) {
		t.Error("the audit log holds labels")
	}
}

func TestWants(t *testing.T) {
	w := world.New(t, `rules: [{clusters: [one], when: 'pod.labels.a == "b"'}, {clusters: [two], when: 'has(ns.labels.x) || has(pod.annotations.y)'}]`)
	p := w.RA.Policy.Value()
	if got, want := registration.Wants(p, "one"), (attestor.Wants{PodLabels: true}); got != want {
		t.Errorf("one: %+v", got)
	}
	if got, want := registration.Wants(p, "two"), (attestor.Wants{PodAnnotations: true, NamespaceLabels: true}); got != want {
		t.Errorf("two: %+v", got)
	}
}

func TestGrantedDNSNamesAreInTheCertificate(t *testing.T) {
	w := world.New(t, "rules: [{dnsNames: ['{serviceAccount}.{namespace}.svc', '{serviceAccount}.{namespace}']}]")
	agent, err := w.RA.Admit(t.Context(), w.AttestAgent(world.Agent), world.Cluster)
	if err != nil {
		t.Fatal(err)
	}
	for name, asked := range map[string][]string{"none asked for": nil, "one of them asked for": {"web.shop"}} {
		r := request(w)
		r.CSR = world.CSR(t, world.NewKey(t), x509.CertificateRequest{DNSNames: asked})
		svid, err := w.RA.Issue(t.Context(), agent, r)
		if err != nil || !slices.Equal(svid.Chain[0].DNSNames, []string{"web.shop.svc", "web.shop"}) {
			t.Errorf("%s: %v, %v", name, svid.Chain, err)
		}
	}
	r := request(w)
	r.CSR = world.CSR(t, world.NewKey(t), x509.CertificateRequest{DNSNames: []string{"web.shop", "db.shop"}})
	if _, err := w.RA.Issue(t.Context(), agent, r); refusal.Of(err) != refusal.CSRAsksMore {
		t.Errorf("a further name: %v", err)
	}
}

// newest is the evidence of the ledger's last entry.
func newest(t *testing.T, w *world.World) (e registration.LedgerEvidence) {
	t.Helper()
	err := w.Store.ScanLedger(t.Context(), func(entry ca.LedgerEntry) (bool, error) {
		return false, json.Unmarshal(entry.Evidence, &e)
	})
	if err != nil {
		t.Fatal(err)
	}
	return e
}
