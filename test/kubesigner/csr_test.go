package kubesigner_test

import (
	"crypto/rand"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"strings"
	"testing"
	"time"

	certificatesv1 "k8s.io/api/certificates/v1"
	corev1 "k8s.io/api/core/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"

	"github.com/meshca/meshca/test/world"
)

const directForAll = "rules: [{direct: true}]"

var usages = []certificatesv1.KeyUsage{"digital signature", "server auth", "client auth"}

// podToken is the token by which the house's pod speaks to the API server.
func (h *house) podToken() string {
	return must(h.Cluster.Token(h.t.Context(), h.namespace, "web", h.pod, "", time.Hour))(h.t)
}

// signingRequest is made by whoever has the token; empty: by the administrator.
func (h *house) signingRequest(token string, change func(*certificatesv1.CertificateSigningRequest)) *certificatesv1.CertificateSigningRequest {
	h.t.Helper()
	client := kubernetes.Interface(h.Clientset)
	if token != "" {
		client = must(kubernetes.NewForConfig(&rest.Config{Host: h.URL, BearerToken: token, TLSClientConfig: rest.TLSClientConfig{CAFile: h.CAFile}}))(h.t)
		rule := rbacv1.PolicyRule{APIGroups: []string{"certificates.k8s.io"}, Resources: []string{"certificatesigningrequests"}, Verbs: []string{"create"}}
		_ = h.Allow(h.t.Context(), "system:serviceaccount:"+h.namespace+":web", rule) // once is enough
	}
	r := &certificatesv1.CertificateSigningRequest{
		ObjectMeta: metav1.ObjectMeta{GenerateName: "web-"},
		Spec: certificatesv1.CertificateSigningRequestSpec{
			SignerName: signerName, Usages: usages,
			Request: pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE REQUEST", Bytes: stubRequest(h.t, nil)}),
		},
	}
	if change != nil {
		change(r)
	}
	return must(client.CertificatesV1().CertificateSigningRequests().Create(h.t.Context(), r, metav1.CreateOptions{}))(h.t)
}

// signed waits until a signing request has a certificate, or will have none.
func (h *house) signed(r *certificatesv1.CertificateSigningRequest) *certificatesv1.CertificateSigningRequest {
	h.t.Helper()
	var now *certificatesv1.CertificateSigningRequest
	eventually(h.t, func() (err error) {
		now, err = h.Clientset.CertificatesV1().CertificateSigningRequests().Get(h.t.Context(), r.Name, metav1.GetOptions{})
		if err == nil && len(now.Status.Certificate) == 0 && condition(now, "Denied") == nil && condition(now, "Failed") == nil {
			err = errors.New("it is open")
		}
		return err
	})
	return now
}

func condition(r *certificatesv1.CertificateSigningRequest, kind certificatesv1.RequestConditionType) *certificatesv1.CertificateSigningRequestCondition {
	for i, c := range r.Status.Conditions {
		if c.Type == kind {
			return &r.Status.Conditions[i]
		}
	}
	return nil
}

func TestSigningRequest(t *testing.T) {
	h := newHouse(t, shared, directForAll, "meshca")
	h.signer("ca-0")
	token := h.podToken()
	for name, c := range map[string]struct {
		seconds *int32
		life    time.Duration
	}{"the grant's life": {nil, 6 * time.Hour}, "a shorter life": {ptr(int32(900)), 15 * time.Minute}, "more than is granted": {ptr(int32(30 * 86400)), 6 * time.Hour}} {
		r := h.signed(h.signingRequest(token, func(r *certificatesv1.CertificateSigningRequest) { r.Spec.ExpirationSeconds = c.seconds }))
		approved := condition(r, "Approved")
		if approved == nil || len(r.Status.Certificate) == 0 {
			t.Fatalf("%s: %+v", name, r.Status)
		}
		want := "spiffe://mesh.test/ns/" + h.namespace + "/sa/web"
		if id := h.verified(string(r.Status.Certificate)); id != want || !strings.Contains(approved.Message, want) {
			t.Errorf("%s: issued %s, approved: %s", name, id, approved.Message)
		}
		leaf := chain(t, string(r.Status.Certificate))[0]
		if life := leaf.NotAfter.Sub(leaf.NotBefore) - time.Minute; life != c.life {
			t.Errorf("%s: a life of %s, want %s", name, life, c.life)
		}
		if found := h.entries(r.UID); len(found) != 1 || found[0].Way != "direct" || found[0].PodUID != string(h.pod.UID) || len(found[0].CredentialID) != 36 {
			t.Errorf("%s: the ledger's entries: %+v", name, found)
		}
	}
}

func TestSigningRequestRefused(t *testing.T) {
	h := newHouse(t, shared, "rules: [{when: 'pod.name == \"open\"', direct: true}, {}]", "meshca")
	h.signer("ca-0")
	unbound := must(h.Cluster.Token(t.Context(), h.namespace, "web", nil, "", time.Hour))(t)
	open := must(h.CreatePod(t.Context(), h.namespace, "open", "web", h.node.Name))(t)
	openToken := must(h.Cluster.Token(t.Context(), h.namespace, "web", open, "", time.Hour))(t)
	type change = func(*certificatesv1.CertificateSigningRequest)
	for name, c := range map[string]struct {
		token        string
		change       change
		reason, says string
	}{
		"policy does not say direct": {h.podToken(), nil, "DIRECT_NOT_ALLOWED", "direct"},
		"bound to no pod":            {unbound, nil, "TOKEN_UNBOUND", "no pod"},
		"made by a person":           {"", nil, "TOKEN_NOT_SERVICE_ACCOUNT", "admin"},
		"a usage that no SVID has": {openToken, func(r *certificatesv1.CertificateSigningRequest) { r.Spec.Usages = append(r.Spec.Usages, "cert sign") },
			"REQUEST_MALFORMED", "cert sign"},
		"less than an SVID has": {openToken, func(r *certificatesv1.CertificateSigningRequest) { r.Spec.Usages = usages[:1] }, "REQUEST_MALFORMED", "server auth"},
		"another's name": {openToken, func(r *certificatesv1.CertificateSigningRequest) {
			der := must(x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{DNSNames: []string{"bank.example"}}, world.NewKey(t)))(t)
			r.Spec.Request = pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE REQUEST", Bytes: der})
		}, "CSR_ASKS_MORE", "bank.example"},
	} {
		t.Run(name, func(t *testing.T) {
			r := h.signed(h.signingRequest(c.token, c.change))
			denied := condition(r, "Denied")
			if denied == nil || denied.Reason != c.reason || !strings.Contains(denied.Message, c.says) || len(r.Status.Certificate) != 0 {
				t.Errorf("got %+v, want %s, %q in the message", r.Status.Conditions, c.reason, c.says)
			}
			if n := len(h.entries(r.UID)); n != 0 {
				t.Errorf("the ledger has %d entries for it", n)
			}
		})
	}
}

// The request was made while its pod lived. No CA was there yet, or it might be quicker than the deletion.
func TestSigningRequestOfAPodThatIsGone(t *testing.T) {
	h := newHouse(t, shared, directForAll, "meshca")
	r := h.signingRequest(h.podToken(), nil)
	if err := h.DeletePod(t.Context(), h.pod, 0); err != nil {
		t.Fatal(err)
	}
	h.signer("ca-0")
	if denied := condition(h.signed(r), "Denied"); denied == nil || denied.Reason != "POD_GONE" {
		t.Errorf("%+v", denied)
	}
}

// An approver's word is leave to sign, and no more; his refusal stands.
func TestAnApprover(t *testing.T) {
	h := newHouse(t, shared, "rules: [{when: 'pod.name == \"web-1\"', direct: true}, {name: closed, deny: true}]", "meshca")
	shut := must(h.CreatePod(t.Context(), h.namespace, "shut", "web", h.node.Name))(t)
	decide := func(r *certificatesv1.CertificateSigningRequest, kind certificatesv1.RequestConditionType) *certificatesv1.CertificateSigningRequest {
		t.Helper()
		r.Status.Conditions = []certificatesv1.CertificateSigningRequestCondition{{Type: kind, Status: corev1.ConditionTrue, Reason: "Person", Message: "said so"}}
		return must(h.Clientset.CertificatesV1().CertificateSigningRequests().UpdateApproval(t.Context(), r.Name, r, metav1.UpdateOptions{}))(t)
	}
	granted := decide(h.signingRequest(h.podToken(), nil), "Approved")
	refused := decide(h.signingRequest(must(h.Cluster.Token(t.Context(), h.namespace, "web", shut, "", time.Hour))(t), nil), "Approved")
	denied := decide(h.signingRequest(h.podToken(), nil), "Denied")
	h.signer("ca-0")
	if r := h.signed(granted); len(r.Status.Certificate) == 0 || condition(r, "Approved").Reason != "Person" || len(r.Status.Conditions) != 1 {
		t.Errorf("approved and granted: %+v", r.Status)
	}
	if r := h.signed(refused); len(r.Status.Certificate) != 0 || condition(r, "Failed") == nil || condition(r, "Failed").Reason != "POLICY_DENIED" {
		t.Errorf("approved and refused: %+v", r.Status)
	}
	now := must(h.Clientset.CertificatesV1().CertificateSigningRequests().Get(t.Context(), denied.Name, metav1.GetOptions{}))(t)
	if now.ResourceVersion != denied.ResourceVersion || len(h.entries(denied.UID)) != 0 {
		t.Errorf("denied: %+v", now)
	}
}
