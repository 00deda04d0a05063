package kubesigner_test

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	certificatesv1beta1 "k8s.io/api/certificates/v1beta1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	"github.com/meshca/meshca/ca"
	"github.com/meshca/meshca/ca/registration"
	"github.com/meshca/meshca/test/kube"
	"github.com/meshca/meshca/test/world"
)

func nodeName(s string) types.NodeName { return types.NodeName(s) }

// stubRequest is an empty CSR, as kubelets make them.
func stubRequest(t *testing.T, key crypto.Signer) []byte {
	t.Helper()
	if key == nil {
		key = world.NewKey(t)
	}
	return world.CSR(t, key, x509.CertificateRequest{})
}

// chain reads PEM.
func chain(t *testing.T, text string) []*x509.Certificate {
	t.Helper()
	var all []*x509.Certificate
	for rest := []byte(text); ; {
		var block *pem.Block
		if block, rest = pem.Decode(rest); block == nil {
			return all
		}
		all = append(all, must(x509.ParseCertificate(block.Bytes))(t))
	}
}

// verified is the ID of a chain that the CA's bundle bears.
func (h *house) verified(text string) string {
	h.t.Helper()
	bundle, _ := h.Trust.Bundle()
	id, _, err := x509svid.Verify(chain(h.t, text), x509bundle.FromX509Authorities(world.TrustDomain, bundle.X509Authorities()))
	if err != nil {
		h.t.Fatal(err)
	}
	return id.String()
}

// entries are the ledger's for an object.
func (h *house) entries(uid types.UID) (found []registration.LedgerEvidence) {
	h.t.Helper()
	err := h.Store.ScanLedger(h.t.Context(), func(e ca.LedgerEntry) (bool, error) {
		var v registration.LedgerEvidence
		if err := json.Unmarshal(e.Evidence, &v); err != nil {
			return false, err
		}
		if v.Object == string(uid) {
			found = append(found, v)
		}
		return true, nil
	})
	if err != nil {
		h.t.Fatal(err)
	}
	return found
}

func TestPodCertificate(t *testing.T) {
	h := newHouse(t, shared, "", "meshca")
	s := h.signer("ca-0")
	for name, change := range map[string]func(*certificatesv1beta1.PodCertificateRequest){
		"as kubelet makes it": nil,
		"an hour":             func(r *certificatesv1beta1.PodCertificateRequest) { r.Spec.MaxExpirationSeconds = ptr(int32(3600)) },
		"as kubelet of 1.35 makes it": func(r *certificatesv1beta1.PodCertificateRequest) {
			key := world.NewKey(t)
			digest := sha256.Sum256([]byte(r.Spec.PodUID))
			r.Spec.StubPKCS10Request = nil
			r.Spec.PKIXPublicKey = must(x509.MarshalPKIXPublicKey(key.Public()))(t)             //nolint:staticcheck // the form of 1.35
			r.Spec.ProofOfPossession = must(key.Sign(rand.Reader, digest[:], crypto.SHA256))(t) //nolint:staticcheck // the form of 1.35
		},
	} {
		t.Run(name, func(t *testing.T) {
			r := h.answered(h.podRequest(change))
			st := r.Status
			if st.Conditions[0].Type != "Issued" {
				t.Fatalf("%+v", st.Conditions)
			}
			want := "spiffe://mesh.test/ns/" + h.namespace + "/sa/web"
			if id := h.verified(st.CertificateChain); id != want {
				t.Errorf("issued %s, want %s", id, want)
			}
			leaf := chain(t, st.CertificateChain)[0]
			whole := leaf.NotAfter.Sub(leaf.NotBefore)
			if most := time.Duration(*r.Spec.MaxExpirationSeconds) * time.Second; whole > most || whole < time.Hour || most == time.Hour && whole != time.Hour {
				t.Errorf("a life of %s of %s", whole, most)
			}
			life := leaf.NotAfter.Sub(leaf.NotBefore.Add(ca.DefaultBackdate))
			if due := st.BeginRefreshAt.Sub(leaf.NotBefore.Add(ca.DefaultBackdate)); due < life/4-time.Second || due > life*3/4+time.Second {
				t.Errorf("it is refreshed after %s of %s", due, life)
			}
			found := h.entries(r.UID)
			if len(found) != 1 || found[0].Way != "kubelet" || found[0].PodUID != string(h.pod.UID) || found[0].NodeUID != string(h.node.UID) ||
				found[0].ServiceAccountUID != string(h.account.UID) || found[0].Door != "podcertificaterequest" {
				t.Errorf("the ledger's entries: %+v", found)
			}
			line := h.Audit.Last(t)
			if line["outcome"] != "issued" || line["object"] != string(r.UID) || line["proven"] != true {
				t.Errorf("audit line: %v", line)
			}
		})
	}
	eventually(t, func() error {
		for _, d := range s.Status() {
			if d.State != "serving" || d.Pending != 0 || d.Version == "" {
				return fmt.Errorf("%+v", d)
			}
		}
		return nil
	})
}

func ptr[T any](v T) *T { return &v }

func TestPodCertificateDenied(t *testing.T) {
	h := newHouse(t, shared, "rules: [{serviceAccounts: [brief], ttl: 30m}, {name: closed, serviceAccounts: [shut], deny: true}, {}]", "meshca")
	h.signer("ca-0")
	p521 := must(ecdsa.GenerateKey(elliptic.P521(), rand.Reader))(t)
	account := func(name string) func(*certificatesv1beta1.PodCertificateRequest) {
		return func(r *certificatesv1beta1.PodCertificateRequest) {
			sa := must(h.CreateServiceAccount(t.Context(), h.namespace, name))(t)
			pod := must(h.CreatePod(t.Context(), h.namespace, name+"-1", name, h.node.Name))(t)
			r.Spec.ServiceAccountName, r.Spec.ServiceAccountUID, r.Spec.PodName, r.Spec.PodUID = name, sa.UID, pod.Name, pod.UID
		}
	}
	for name, c := range map[string]struct {
		change       func(*certificatesv1beta1.PodCertificateRequest)
		reason, says string
	}{
		"policy":                 {account("shut"), "POLICY_DENIED", "closed"},
		"a life below the API's": {account("brief"), "LIFE_TOO_SHORT", "30m"},
		"another pod's UID": {func(r *certificatesv1beta1.PodCertificateRequest) {
			r.Spec.PodUID = "11111111-2222-3333-4444-555555555555"
		}, "POD_RECREATED", "another one"},
		"another account's UID": {func(r *certificatesv1beta1.PodCertificateRequest) {
			r.Spec.ServiceAccountUID = "11111111-2222-3333-4444-555555555555"
		}, "SERVICE_ACCOUNT_GONE", "another one"},
		"another node's UID": {func(r *certificatesv1beta1.PodCertificateRequest) {
			r.Spec.NodeUID = "11111111-2222-3333-4444-555555555555"
		}, "NODE_GONE", "another one"},
		"another node":           {func(r *certificatesv1beta1.PodCertificateRequest) { r.Spec.NodeName = "elsewhere" }, "POD_NOT_ON_NODE", "elsewhere"},
		"another account":        {func(r *certificatesv1beta1.PodCertificateRequest) { r.Spec.ServiceAccountName = "admin" }, "CLAIM_UNTRUE", "runs as"},
		"a key that no leaf has": {func(r *certificatesv1beta1.PodCertificateRequest) { r.Spec.StubPKCS10Request = stubRequest(t, p521) }, "UnsupportedKeyType", "P-256"},
		"annotations of the user": {func(r *certificatesv1beta1.PodCertificateRequest) {
			r.Spec.UnverifiedUserAnnotations = map[string]string{"acme.example/x": "y"}
		}, "InvalidUnverifiedUserAnnotations", "acme.example/x"},
		"names in the CSR": {func(r *certificatesv1beta1.PodCertificateRequest) {
			r.Spec.StubPKCS10Request = world.CSR(t, world.NewKey(t), x509.CertificateRequest{DNSNames: []string{"bank.example"}})
		}, "CSR_ASKS_MORE", "bank.example"},
	} {
		t.Run(name, func(t *testing.T) {
			r := h.answered(h.podRequest(c.change))
			got := r.Status.Conditions[0]
			if got.Type != "Denied" || got.Reason != c.reason || !strings.Contains(got.Message, c.says) || r.Status.CertificateChain != "" {
				t.Errorf("got %+v, want %s, %q in the message", got, c.reason, c.says)
			}
			if n := len(h.entries(r.UID)); n != 0 {
				t.Errorf("the ledger has %d entries for it", n)
			}
		})
	}
}

// A request for another signer is none of ours.
func TestOthersRequestsAreLetBe(t *testing.T) {
	h := newHouse(t, shared, "", "meshca")
	h.signer("ca-0")
	other := h.podRequest(func(r *certificatesv1beta1.PodCertificateRequest) { r.Spec.SignerName = "other.example/signer" })
	h.answered(h.podRequest(nil)) // which came after it
	now := must(h.Clientset.CertificatesV1beta1().PodCertificateRequests(h.namespace).Get(t.Context(), other.Name, metav1.GetOptions{}))(t)
	if now.ResourceVersion != other.ResourceVersion {
		t.Errorf("somebody changed it: %+v", now)
	}
}

// What passes is no answer: the request stays open, and is answered when the CA can.
func TestAFaultThatPasses(t *testing.T) {
	h := newHouse(t, shared, "", "meshca")
	h.signer("ca-0")
	well := h.CA.Assignment()
	h.CA.Assign(ca.Assignment{Root: ca.Root{ID: strings.Repeat("ab", 32), Ref: "nowhere"}})
	r := h.podRequest(nil)
	eventually(t, func() error { // it was tried, more than once
		if n := strings.Count(h.Audit.String(), `"outcome":"ISSUER_NOT_READY"`); n < 2 {
			return fmt.Errorf("%d tries", n)
		}
		return nil
	})
	now := must(h.Clientset.CertificatesV1beta1().PodCertificateRequests(h.namespace).Get(t.Context(), r.Name, metav1.GetOptions{}))(t)
	if len(now.Status.Conditions) != 0 {
		t.Fatalf("a fault that passes was answered: %+v", now.Status.Conditions)
	}
	h.CA.Assign(well)
	must(h.CA.Prepare(well.Root).Renew(t.Context()))(t)
	if got := h.answered(r).Status.Conditions[0]; got.Type != "Issued" {
		t.Errorf("%+v", got)
	}
}

// Several replicas serve one cluster: each request is signed once.
func TestReplicas(t *testing.T) {
	h := newHouse(t, shared, "", "meshca")
	for i := range 3 {
		h.signer(fmt.Sprintf("ca-%d", i))
	}
	const requests = 30
	all := make([]*certificatesv1beta1.PodCertificateRequest, requests)
	var wg sync.WaitGroup
	for i := range all {
		wg.Go(func() { all[i] = h.podRequest(nil) })
	}
	wg.Wait()
	by := map[string]int{}
	for _, r := range all {
		got := h.answered(r)
		if got.Status.Conditions[0].Type != "Issued" {
			t.Fatalf("%+v", got.Status.Conditions)
		}
		if n := len(h.entries(r.UID)); n != 1 {
			t.Errorf("it was signed %d times", n)
		}
		by[got.Annotations["meshca.io/answered-by"]]++
	}
	t.Logf("answered by %v", by)
	if len(by) < 2 {
		t.Errorf("one replica did it all: %v", by)
	}
}

// A replica that died with a request in hand is succeeded, and not at once.
func TestAReplicaThatDied(t *testing.T) {
	h := newHouse(t, shared, "", "meshca")
	r := h.podRequest(func(r *certificatesv1beta1.PodCertificateRequest) {
		r.Annotations = map[string]string{"meshca.io/answered-by": "ca-that-died"}
	})
	began := time.Now()
	h.signer("ca-0")
	got := h.answered(r)
	if took := time.Since(began); got.Status.Conditions[0].Type != "Issued" || took < 29*time.Second {
		t.Errorf("%+v after %s", got.Status.Conditions, took)
	}
}

// The API server goes away and comes back, and so does the API itself.
func TestTheAPIComesAndGoes(t *testing.T) {
	c := kube.Start(t)
	if err := allow(t.Context(), c, "meshca", "meshca-trust meshca", "meshca-trust linkerd"); err != nil {
		t.Fatal(err)
	}
	h := newHouse(t, c, directForAll, "meshca")
	s := h.signer("ca-0")
	state := func(want string) {
		t.Helper()
		eventually(t, func() error {
			if d := s.Status()[0]; d.State != want {
				return fmt.Errorf("%+v, want %s", d, want)
			}
			return nil
		})
	}
	// 1. It is not served, and the other kind of request is.
	state("not served")
	if got := h.signed(h.signingRequest(h.podToken(), nil)); len(got.Status.Certificate) == 0 {
		t.Errorf("a signing request: %+v", got.Status)
	}
	// 2. It is served.
	restart := func(args ...string) {
		t.Helper()
		c.Stop()
		if err := c.StartAgain(t.Context(), args...); err != nil {
			t.Fatal(err)
		}
	}
	restart(kube.WithPodCertificates()...)
	state("serving")
	if got := h.answered(h.podRequest(nil)).Status.Conditions[0]; got.Type != "Issued" {
		t.Errorf("%+v", got)
	}
	// 3. The API server hangs while there is something to answer.
	r := h.podRequest(nil)
	if err := errors.Join(c.Freeze(), c.Thaw()); err != nil {
		t.Fatal(err)
	}
	restart(kube.WithPodCertificates()...)
	if got := h.answered(r).Status.Conditions[0]; got.Type != "Issued" {
		t.Errorf("%+v", got)
	}
	// 4. It is served no more.
	restart()
	state("not served")
	if line := h.Audit.String(); strings.Contains(line, "INTERNAL") {
		t.Errorf("an internal fault: %s", line)
	}
}
