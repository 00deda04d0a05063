package registration_test

import (
	"crypto/x509"
	"strings"
	"testing"
	"time"

	"github.com/meshca/meshca/api/refusal"
	"github.com/meshca/meshca/attestor"
	"github.com/meshca/meshca/ca"
	"github.com/meshca/meshca/ca/registration"
	"github.com/meshca/meshca/test/world"
)

// claim is a request by an object for the pod that the world knows.
func claim(w *world.World, kubelet bool) registration.Request {
	method := attestor.MethodSigningRequest
	if kubelet {
		method = attestor.MethodPodCertificate
	}
	id, err := attestor.NewIdentity(world.Cluster, "shop", "web")
	if err != nil {
		w.T.Fatal(err)
	}
	return registration.Request{
		Door: "podcertificaterequest", CSR: world.CSR(w.T, world.NewKey(w.T), x509.CertificateRequest{}),
		Claim: &registration.Claim{Object: "uid-of-request", Said: attestor.Evidence{
			Proven: true, Identity: id, Method: method, ServiceAccountUID: world.Web.ServiceAccountUID,
			PodName: "web-1", PodUID: world.Web.PodUID, NodeName: world.Web.Node, NodeUID: world.Web.NodeUID,
		}},
	}
}

func byObject(t *testing.T, w *world.World, r registration.Request) (ca.SVID, error) {
	t.Helper()
	by, err := w.RA.AdmitObjects(world.Cluster)
	if err != nil {
		t.Fatal(err)
	}
	return w.RA.Issue(t.Context(), by, r)
}

func TestAClaimThatTheClusterConfirms(t *testing.T) {
	w := known(t, "", world.Web)
	svid, err := byObject(t, w, claim(w, true))
	if err != nil || svid.ID.Path() != "/ns/shop/sa/web" {
		t.Fatalf("%s, %v", svid.ID, err)
	}
	line, evidence := w.Audit.Last(t), newest(t, w)
	for key, want := range map[string]any{
		"outcome": "issued", "way": "kubelet", "object": "uid-of-request", "door": "podcertificaterequest", "proven": true, "podUID": "pod-web-1",
		"method": "kubernetes/podCertificateRequest",
	} {
		if line[key] != want {
			t.Errorf("audit line: %s = %v, want %v", key, line[key], want)
		}
	}
	if evidence.Way != "kubelet" || evidence.Object != "uid-of-request" || evidence.Agent != "" || evidence.PodUID != "pod-web-1" {
		t.Errorf("the ledger's evidence: %+v", evidence)
	}
	if found := w.Journal.Ring().ByPod("shop", "web-1", 5); len(found) != 1 || found[0].Outcome != registration.OutcomeIssued {
		t.Errorf("the ring remembers %+v", found)
	}
}

// What a pod asks for by its own object needs policy's leave, as all that a workload asks for without an agent.
func TestAPodsOwnObjectIsADirectRequest(t *testing.T) {
	w := known(t, "rules: [{}]", world.Web)
	if _, err := byObject(t, w, claim(w, false)); refusal.Of(err) != refusal.DirectNotAllowed {
		t.Errorf("without leave: %v", err)
	}
	w.SetPolicy(directForWeb)
	if _, err := byObject(t, w, claim(w, false)); err != nil || newest(t, w).Way != "direct" {
		t.Errorf("with leave: %v, %+v", err, newest(t, w))
	}
}

func TestClaimsThatAreRefused(t *testing.T) {
	for name, c := range map[string]struct {
		rules  string
		change func(*world.World, *registration.Request)
		want   refusal.Reason
	}{
		"a claim that is not so": {change: func(_ *world.World, r *registration.Request) { r.Claim.Said.ServiceAccountUID = "another" }, want: refusal.ClaimUntrue},
		"policy that denies":     {rules: "rules: [{name: closed, namespaces: [shop], deny: true}]", want: refusal.PolicyDenied},
		"policy without a rule":  {rules: "rules: [{namespaces: [bank]}]", want: refusal.PolicyNoRule},
		"a denied identity": {change: func(w *world.World, _ *registration.Request) {
			denied("spiffe://mesh.test/ns/shop/sa/web")(w, nil)
		}, want: refusal.IdentityDenied},
		"a life that is shorter than the API's": {rules: "rules: [{ttl: 30m}]", change: func(_ *world.World, r *registration.Request) { r.AtLeast = 59 * time.Minute },
			want: refusal.LifeTooShort},
		"more names than are granted": {change: func(w *world.World, r *registration.Request) {
			r.CSR = world.CSR(w.T, world.NewKey(w.T), x509.CertificateRequest{DNSNames: []string{"web.shop"}})
		}, want: refusal.CSRAsksMore},
		"a proof that is none": {change: func(_ *world.World, r *registration.Request) { r.CSR, r.Proof = nil, &ca.KeyProof{} }, want: refusal.CSRMalformed},
		"no claim":             {change: func(_ *world.World, r *registration.Request) { r.Claim = nil }, want: refusal.Internal},
	} {
		t.Run(name, func(t *testing.T) {
			w := known(t, c.rules, world.Web)
			r := claim(w, true)
			if c.change != nil {
				c.change(w, &r)
			}
			before := ledgerSize(t, w)
			_, err := byObject(t, w, r)
			if refusal.Of(err) != c.want || ledgerSize(t, w) != before {
				t.Fatalf("got %v, want %s; the ledger grew by %d", err, c.want, ledgerSize(t, w)-before)
			}
			line := w.Audit.Last(t)
			if line["outcome"] != string(c.want) || c.want != refusal.Internal && (line["object"] != "uid-of-request" || line["pod"] != "web-1") {
				t.Errorf("audit line: %v", line)
			}
			if proven := line["proven"]; c.want == refusal.ClaimUntrue && proven != false {
				t.Errorf("what was not confirmed is called proven: %v", line)
			}
		})
	}
	// A claim proves nothing at the door of agents, and agents' tokens nothing at that of objects.
	w := known(t, "", world.Web)
	agent, err := w.RA.Admit(t.Context(), w.AttestAgent(world.Agent), world.Cluster)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := w.RA.Issue(t.Context(), agent, claim(w, true)); refusal.Of(err) != refusal.Internal {
		t.Errorf("a claim by an agent: %v", err)
	}
	if _, err := w.RA.AdmitObjects("elsewhere"); refusal.Of(err) != refusal.ClusterUnknown {
		t.Errorf("an unknown cluster: %v", err)
	}
}

// A door's own refusal leaves the line and the memory that every refusal leaves, of a claim that nobody confirmed.
func TestADoorRefuses(t *testing.T) {
	w := known(t, "", world.Web)
	by, err := w.RA.AdmitObjects(world.Cluster)
	if err != nil {
		t.Fatal(err)
	}
	no := refusal.New(refusal.RequestMalformed, "no such usage")
	if err := w.RA.Refuse(by, claim(w, true), no); err != error(no) {
		t.Errorf("it returns %v", err)
	}
	line := w.Audit.Last(t)
	if line["outcome"] != "REQUEST_MALFORMED" || line["object"] != "uid-of-request" || line["proven"] != false || line["pod"] != "web-1" || line["way"] != "kubelet" {
		t.Errorf("audit line: %v", line)
	}
	if found := w.Journal.Ring().ByPod("shop", "web-1", 5); len(found) != 1 || found[0].Outcome != "REQUEST_MALFORMED" {
		t.Errorf("the ring remembers %+v", found)
	}
	// What a stranger may have written into an object is bounded.
	long := claim(w, false)
	long.Claim.Said.PodUID, long.Claim.Object = strings.Repeat("x", 1<<20), strings.Repeat("y", 1<<20)
	_ = w.RA.Refuse(by, long, no)
	if _, err := w.RA.Issue(t.Context(), by, long); err == nil {
		t.Error("it was issued")
	}
	if n := len(w.Audit.String()); n > 8<<10 {
		t.Errorf("the audit log has %d bytes", n)
	}
}

// What was issued a moment ago stands until the cause, the policy or an operator says otherwise; asking leaves no line.
func TestWhatWasIssuedStands(t *testing.T) {
	for name, c := range map[string]struct {
		change func(w *world.World)
		want   refusal.Reason
	}{
		"nothing changed": {func(*world.World) {}, ""},
		"it is denied": {func(w *world.World) {
			denial := ca.Denial{ID: "spiffe://mesh.test/ns/shop/sa/web", Since: time.Now(), By: "uid 0"}
			if _, err := w.RA.Orders.Deny(w.T.Context(), denial); err != nil {
				w.T.Fatal(err)
			}
		}, refusal.IdentityDenied},
		"the account was made anew": {func(w *world.World) {
			w.Pods.Range(func(ref, of any) bool {
				ev := of.(attestor.Evidence)
				ev.ServiceAccountUID = "another"
				w.Pods.Store(ref, ev)
				return true
			})
		}, refusal.ClaimUntrue},
		"policy denies":                {func(w *world.World) { w.SetPolicy("rules: [{deny: true}]") }, refusal.PolicyDenied},
		"policy grants another ID":     {func(w *world.World) { w.SetPolicy("rules: [{id: '/{cluster}/{namespace}/{serviceAccount}'}]") }, refusal.PolicyDenied},
		"policy grants less time":      {func(w *world.World) { w.SetPolicy("rules: [{ttl: 5h, dnsNames: [web.example]}]") }, refusal.PolicyDenied},
		"policy grants no name":        {func(w *world.World) { w.SetPolicy("rules: [{}]") }, refusal.PolicyDenied},
		"policy grants a further name": {func(w *world.World) { w.SetPolicy("rules: [{dnsNames: [web.example, more.example]}]") }, ""},
	} {
		t.Run(name, func(t *testing.T) {
			w := known(t, "rules: [{dnsNames: [web.example]}]", world.Web)
			by, err := w.RA.AdmitObjects(world.Cluster)
			if err != nil {
				t.Fatal(err)
			}
			r := claim(w, true)
			svid, err := w.RA.Issue(t.Context(), by, r)
			if err != nil {
				t.Fatal(err)
			}
			c.change(w)
			lines := len(w.Audit.Lines(t))
			if err := w.RA.Stands(t.Context(), by, r, svid); refusal.Of(err) != c.want {
				t.Errorf("got %v, want %q", err, c.want)
			}
			if n := len(w.Audit.Lines(t)); n != lines {
				t.Errorf("asking left %d audit lines", n-lines)
			}
		})
	}
}
