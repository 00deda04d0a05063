package kubesigner

import (
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"math/big"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	certificatesv1 "k8s.io/api/certificates/v1"
	certificatesv1beta1 "k8s.io/api/certificates/v1beta1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"pgregory.net/rapid"

	"github.com/meshca/meshca/api/refusal"
	"github.com/meshca/meshca/ca"
)

// A kubelet takes Denied for the end of it: no fault that passes, and none of the CA's own, is ever one.
func TestWhatIsFinal(t *testing.T) {
	for _, r := range refusal.All() {
		err := fmt.Errorf("around it: %w", refusal.New(r, "x"))
		code := r.Code().String()
		want := code != "Unavailable" && code != "ResourceExhausted" && code != "Internal"
		if no, final := finally(err); final != want || final && no.Reason != r {
			t.Errorf("%s (%s): final %v, want %v", r, code, final, want)
		}
	}
	if _, final := finally(errors.New("something else")); final {
		t.Error("what is no refusal is final")
	}
	if _, final := finally(nil); final {
		t.Error("no error is final")
	}
}

func TestBackoff(t *testing.T) {
	for failures := range 100 {
		if failures == 0 {
			continue
		}
		full := min(firstRetry<<min(failures-1, 10), lastRetry)
		for range 20 {
			if d := backoff(failures); d < full/2 || d > full*3/2 {
				t.Fatalf("failure %d: %s of %s", failures, d, full)
			}
		}
	}
}

// When kubelet is to refresh is within what the API takes, for every life that can be granted and every pod; and it is the
// same phase time after time.
func TestBeginRefreshIsWithinTheAPIsBounds(t *testing.T) {
	id := spiffeid.RequireFromString("spiffe://mesh.test/ns/shop/sa/web")
	rapid.Check(t, func(t *rapid.T) {
		life := time.Duration(rapid.Int64Range(3540, 6*3600).Draw(t, "life")) * time.Second
		issued := time.Unix(rapid.Int64Range(1.7e9, 2e9).Draw(t, "issued"), 0)
		r := &certificatesv1beta1.PodCertificateRequest{}
		r.Spec.PodUID = types.UID(rapid.String().Draw(t, "pod"))
		leaf := &x509.Certificate{SerialNumber: big.NewInt(1), NotBefore: issued.Add(-time.Minute), NotAfter: issued.Add(life)}
		due := beginRefresh("prod", r, ca.SVID{ID: id, Chain: []*x509.Certificate{leaf}, IssuedAt: issued, NotAfter: leaf.NotAfter, Life: life})
		if due.Before(leaf.NotBefore.Add(10*time.Minute)) || due.After(leaf.NotAfter.Add(-10*time.Minute)) {
			t.Fatalf("due %s after issue of %s", due.Sub(issued), life)
		}
		if after := due.Sub(issued); after < life/4-time.Second || after > life*3/4 {
			t.Fatalf("due %s after issue of %s", after, life)
		}
	})
}

func TestWhatAPodCertificateAsksFor(t *testing.T) {
	r := func(change func(*certificatesv1beta1.PodCertificateRequest)) *certificatesv1beta1.PodCertificateRequest {
		x := &certificatesv1beta1.PodCertificateRequest{ObjectMeta: metav1.ObjectMeta{Namespace: "shop", UID: "object"}}
		x.Spec = certificatesv1beta1.PodCertificateRequestSpec{
			SignerName: DefaultName, PodName: "web-1", PodUID: "pod", ServiceAccountName: "web", ServiceAccountUID: "sa", NodeName: "node-1", NodeUID: "node",
			StubPKCS10Request: []byte("csr"),
		}
		if change != nil {
			change(x)
		}
		return x
	}
	hour, short := int32(3600), int32(600)
	ask, err := askPodCertificate("prod", r(func(x *certificatesv1beta1.PodCertificateRequest) { x.Spec.MaxExpirationSeconds = &hour }))
	// An hour in all, of which a minute lies before the issue.
	if err != nil || ask.TTL != 59*time.Minute || ask.AtLeast != 59*time.Minute || string(ask.CSR) != "csr" || ask.Proof != nil {
		t.Errorf("%+v, %v", ask, err)
	}
	said := ask.Claim.Said
	if said.Identity.String() != "prod/shop/web" || said.ServiceAccountUID != "sa" || said.PodName != "web-1" || said.PodUID != "pod" || said.NodeName != "node-1" ||
		said.NodeUID != "node" || ask.Claim.Object != "object" {
		t.Errorf("the claim: %+v", ask.Claim)
	}
	if ask, err := askPodCertificate("prod", r(nil)); err != nil || ask.TTL != 24*time.Hour-time.Minute {
		t.Errorf("without a life: %s, %v", ask.TTL, err)
	}
	old := r(func(x *certificatesv1beta1.PodCertificateRequest) {
		x.Spec.StubPKCS10Request, x.Spec.PKIXPublicKey, x.Spec.ProofOfPossession = nil, []byte("key"), []byte("proof") //nolint:staticcheck // the form of 1.35
	})
	if ask, err := askPodCertificate("prod", old); err != nil || ask.Proof == nil || string(ask.Proof.PKIX) != "key" || string(ask.Proof.Signed) != "pod" || string(ask.Proof.Signature) != "proof" {
		t.Errorf("with a proof: %+v, %v", ask, err)
	}
	for name, change := range map[string]func(*certificatesv1beta1.PodCertificateRequest){
		"a life that the API has not": func(x *certificatesv1beta1.PodCertificateRequest) { x.Spec.MaxExpirationSeconds = &short },
		"no account":                  func(x *certificatesv1beta1.PodCertificateRequest) { x.Spec.ServiceAccountName = "" },
		"annotations": func(x *certificatesv1beta1.PodCertificateRequest) {
			x.Spec.UnverifiedUserAnnotations = map[string]string{"a/b": ""}
		},
	} {
		if ask, err := askPodCertificate("prod", r(change)); refusal.Of(err) != refusal.RequestMalformed || ask.Claim == nil {
			t.Errorf("%s: %v", name, err)
		}
	}
	p := podCertificates("prod", DefaultName)
	for name, c := range map[string]struct {
		change func(*certificatesv1beta1.PodCertificateRequest)
		open   bool
	}{
		"new":              {nil, true},
		"another signer's": {func(x *certificatesv1beta1.PodCertificateRequest) { x.Spec.SignerName = "other.example/x" }, false},
		"being deleted": {func(x *certificatesv1beta1.PodCertificateRequest) {
			x.DeletionTimestamp = &metav1.Time{Time: time.Now()}
		}, false},
		"issued": {func(x *certificatesv1beta1.PodCertificateRequest) {
			x.Status.Conditions = []metav1.Condition{{Type: "Issued"}}
		}, false},
		"denied": {func(x *certificatesv1beta1.PodCertificateRequest) {
			x.Status.Conditions = []metav1.Condition{{Type: "Denied"}}
		}, false},
		"failed": {func(x *certificatesv1beta1.PodCertificateRequest) {
			x.Status.Conditions = []metav1.Condition{{Type: "Failed"}}
		}, false},
	} {
		x := r(c.change)
		if p.open(x) != c.open {
			t.Errorf("%s: open %v", name, !c.open)
		}
		if p.strip(x); p.open(x) != c.open {
			t.Errorf("%s: open %v once it is stripped", name, !c.open)
		}
	}
}

func signing(change func(*certificatesv1.CertificateSigningRequest)) *certificatesv1.CertificateSigningRequest {
	x := &certificatesv1.CertificateSigningRequest{ObjectMeta: metav1.ObjectMeta{UID: "object"}}
	x.Spec = certificatesv1.CertificateSigningRequestSpec{
		SignerName: DefaultName, Username: "system:serviceaccount:shop:web", UID: "sa",
		Request: []byte("-----BEGIN CERTIFICATE REQUEST-----\nAQID\n-----END CERTIFICATE REQUEST-----\n"),
		Usages:  []certificatesv1.KeyUsage{"client auth", "server auth", "digital signature", "key encipherment"},
		Extra: map[string]certificatesv1.ExtraValue{
			extraPodName: {"web-1"}, extraPodUID: {"pod"}, extraNodeName: {"node-1"}, extraNodeUID: {"node"}, extraCredentialID: {"JTI=abc"},
		},
	}
	if change != nil {
		change(x)
	}
	return x
}

func TestWhatASigningRequestAsksFor(t *testing.T) {
	seconds := int32(900)
	ask, err := askSigning("prod", signing(func(x *certificatesv1.CertificateSigningRequest) { x.Spec.ExpirationSeconds = &seconds }))
	said := ask.Claim.Said
	if err != nil || ask.TTL != 15*time.Minute || ask.AtLeast != 0 || string(ask.CSR) != "\x01\x02\x03" || said.Identity.String() != "prod/shop/web" || said.ServiceAccountUID != "sa" ||
		said.PodName != "web-1" || said.PodUID != "pod" || said.NodeName != "node-1" || said.NodeUID != "node" || said.CredentialID != "abc" || ask.Claim.Object != "object" {
		t.Errorf("%+v, %+v, %v", ask, ask.Claim, err)
	}
	type change = func(*certificatesv1.CertificateSigningRequest)
	extra := func(key string, v ...string) change {
		return func(x *certificatesv1.CertificateSigningRequest) { x.Spec.Extra[key] = v }
	}
	for name, c := range map[string]struct {
		change change
		want   refusal.Reason
	}{
		"a person":               {func(x *certificatesv1.CertificateSigningRequest) { x.Spec.Username = "jane" }, refusal.TokenNotServiceAccount},
		"a node":                 {func(x *certificatesv1.CertificateSigningRequest) { x.Spec.Username = "system:node:node-1" }, refusal.TokenNotServiceAccount},
		"an account of a person": {func(x *certificatesv1.CertificateSigningRequest) { x.Spec.Username = "shop:web" }, refusal.TokenNotServiceAccount},
		"a name with a colon":    {func(x *certificatesv1.CertificateSigningRequest) { x.Spec.Username += ":x" }, refusal.TokenNotServiceAccount},
		"no pod":                 {extra(extraPodName), refusal.TokenUnbound},
		"two pods":               {extra(extraPodUID, "pod", "other"), refusal.TokenUnbound},
		"no node":                {extra(extraNodeUID), refusal.NodeUnknown},
		"a usage too many":       {func(x *certificatesv1.CertificateSigningRequest) { x.Spec.Usages = append(x.Spec.Usages, "any") }, refusal.RequestMalformed},
		"a usage too few":        {func(x *certificatesv1.CertificateSigningRequest) { x.Spec.Usages = x.Spec.Usages[:2] }, refusal.RequestMalformed},
		"no time":                {func(x *certificatesv1.CertificateSigningRequest) { x.Spec.ExpirationSeconds = new(int32) }, refusal.RequestMalformed},
		"no PEM":                 {func(x *certificatesv1.CertificateSigningRequest) { x.Spec.Request = []byte{1, 2} }, refusal.CSRMalformed},
		"other PEM": {func(x *certificatesv1.CertificateSigningRequest) {
			x.Spec.Request = []byte(strings.ReplaceAll(string(x.Spec.Request), " REQUEST", ""))
		}, refusal.CSRMalformed},
		"two of them": {func(x *certificatesv1.CertificateSigningRequest) {
			x.Spec.Request = append(x.Spec.Request, x.Spec.Request...)
		}, refusal.CSRMalformed},
	} {
		if ask, err := askSigning("prod", signing(c.change)); refusal.Of(err) != c.want || ask.Claim == nil {
			t.Errorf("%s: got %v, want %s", name, err, c.want)
		}
	}
	p := signingRequests("prod", DefaultName)
	for name, c := range map[string]struct {
		change change
		open   bool
	}{
		"new":              {nil, true},
		"approved":         {func(x *certificatesv1.CertificateSigningRequest) { withCondition(x, "Approved") }, true},
		"denied":           {func(x *certificatesv1.CertificateSigningRequest) { withCondition(x, "Denied") }, false},
		"failed":           {func(x *certificatesv1.CertificateSigningRequest) { withCondition(x, "Failed") }, false},
		"signed":           {func(x *certificatesv1.CertificateSigningRequest) { x.Status.Certificate = []byte("x") }, false},
		"another signer's": {func(x *certificatesv1.CertificateSigningRequest) { x.Spec.SignerName = "kubernetes.io/kubelet-serving" }, false},
	} {
		x := signing(c.change)
		if p.open(x) != c.open {
			t.Errorf("%s: open %v", name, !c.open)
		}
		if p.strip(x); p.open(x) != c.open {
			t.Errorf("%s: open %v once it is stripped", name, !c.open)
		}
	}
}

func withCondition(x *certificatesv1.CertificateSigningRequest, kind certificatesv1.RequestConditionType) {
	x.Status.Conditions = append(x.Status.Conditions, certificatesv1.CertificateSigningRequestCondition{Type: kind})
}

// FuzzSigningRequest: whatever stands in an object that a stranger made, there is no panic, and what is asked for is
// somebody's, by all names and UIDs.
func FuzzSigningRequest(f *testing.F) {
	for _, change := range []func(*certificatesv1.CertificateSigningRequest){nil, func(x *certificatesv1.CertificateSigningRequest) { x.Spec.Extra = nil }} {
		data, err := json.Marshal(signing(change))
		if err != nil {
			f.Fatal(err)
		}
		f.Add(data)
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		var x certificatesv1.CertificateSigningRequest
		if json.Unmarshal(data, &x) != nil {
			return
		}
		ask, err := askSigning("prod", &x)
		if err != nil {
			if r := refusal.Of(err); !r.Known() || r == refusal.Internal || len(err.Error()) > 2000 {
				t.Fatalf("%v", err)
			}
			return
		}
		said := ask.Claim.Said
		if said.Identity.IsZero() || said.PodName == "" || said.PodUID == "" || said.NodeName == "" || said.NodeUID == "" || ask.TTL < 0 {
			t.Fatalf("%+v", ask)
		}
	})
}
