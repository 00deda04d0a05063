package kubesigner_test

import (
	"context"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"log/slog"
	"math/big"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	"github.com/meshca/meshca/api/kubesigner"
	"github.com/meshca/meshca/test/kube"
	"github.com/meshca/meshca/test/world"
)

// publisher runs a Publisher of everything.
func (h *house) publisher(hold func() error, change func(*kubesigner.PublishConfig)) *kubesigner.Publisher {
	h.t.Helper()
	conf := kubesigner.PublishConfig{
		Refresh: metav1.Duration{Duration: 20 * time.Second}, ClusterTrustBundle: &kubesigner.ClusterTrustBundleConfig{},
		Agents: &kubesigner.ConfigMapConfig{}, Linkerd: &kubesigner.ConfigMapConfig{}, Istio: &kubesigner.EveryNamespaceConfig{},
	}
	if change != nil {
		change(&conf)
	}
	p := must(kubesigner.NewPublisher(kubesigner.PublisherOptions{
		Cluster: world.Cluster, Config: conf, Signer: signerName, Connection: h.attestor, Bundle: h.Trust.Bundle, Hold: hold,
		Log: slog.New(slog.NewTextHandler(testLog{h.t}, nil)), Every: 200 * time.Millisecond,
	}))(h.t)
	h.background(p.Run)
	return p
}

func free() error { return nil }

// sweep takes away what a test published.
func sweep(t *testing.T, c *kube.Cluster) {
	t.Helper()
	ctx := context.Background()
	_ = c.Clientset.CertificatesV1beta1().ClusterTrustBundles().Delete(ctx, "meshca.io:workload:bundle", metav1.DeleteOptions{})
	for _, ns := range must(c.Clientset.CoreV1().Namespaces().List(ctx, metav1.ListOptions{}))(t).Items {
		for _, name := range []string{"istio-ca-root-cert", "meshca-trust", "linkerd-identity-trust-roots"} {
			_ = c.Clientset.CoreV1().ConfigMaps(ns.Name).Delete(ctx, name, metav1.DeleteOptions{})
		}
	}
}

func (h *house) configMap(namespace, name, key string) (string, error) {
	m, err := h.Clientset.CoreV1().ConfigMaps(namespace).Get(h.t.Context(), name, metav1.GetOptions{})
	if err != nil {
		return "", err
	}
	return m.Data[key], nil
}

func (h *house) trustBundle() (string, error) {
	b, err := h.Clientset.CertificatesV1beta1().ClusterTrustBundles().Get(h.t.Context(), "meshca.io:workload:bundle", metav1.GetOptions{})
	if err != nil {
		return "", err
	}
	if b.Spec.SignerName != signerName {
		return "", fmt.Errorf("it is linked to %q", b.Spec.SignerName)
	}
	return b.Spec.TrustBundle, nil
}

// everywhere says where the trust bundle is not as the CA has it.
func (h *house) everywhere() error {
	bundle, _ := h.Trust.Bundle()
	want := bundle.X509Authorities()
	same := func(where, text string, err error) error {
		if err != nil {
			return fmt.Errorf("%s: %w", where, err)
		}
		has := chain(h.t, text)
		if len(has) != len(want) {
			return fmt.Errorf("%s: %d roots, want %d", where, len(has), len(want))
		}
		for _, c := range has {
			if !bundle.HasX509Authority(c) {
				return fmt.Errorf("%s has the root %s", where, c.Subject)
			}
		}
		return nil
	}
	text, err := h.trustBundle()
	faults := []error{same("the ClusterTrustBundle", text, err)}
	text, err = h.configMap("linkerd", "linkerd-identity-trust-roots", "ca-bundle.crt")
	faults = append(faults, same("Linkerd's", text, err))
	for _, ns := range []string{"default", h.namespace} {
		text, err = h.configMap(ns, "istio-ca-root-cert", "root-cert.pem")
		faults = append(faults, same("Istio's in "+ns, text, err))
	}
	text, err = h.configMap("meshca", "meshca-trust", "bundle.json")
	if err == nil {
		var has *spiffebundle.Bundle
		if has, err = spiffebundle.Parse(world.TrustDomain, []byte(text)); err == nil && !has.Equal(bundle) {
			err = errors.New("the agents' is another one")
		}
	}
	return errors.Join(append(faults, err)...)
}

// anotherRoot is a root to be trusted.
func anotherRoot(t *testing.T, name string) *x509.Certificate {
	t.Helper()
	key := world.NewKey(t)
	template := &x509.Certificate{
		SerialNumber: big.NewInt(7), Subject: pkix.Name{CommonName: name}, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(48 * time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
	}
	return must(x509.ParseCertificate(must(x509.CreateCertificate(rand.Reader, template, template, key.Public(), key))(t)))(t)
}

func TestPublish(t *testing.T) {
	t.Cleanup(func() { sweep(t, shared) })
	h := newHouse(t, shared, "", "meshca")
	p := h.publisher(free, nil)
	eventually(t, h.everywhere)
	sequence := func() uint64 { b, _ := h.Trust.Bundle(); n, _ := b.SequenceNumber(); return n }
	published := func() error {
		for _, x := range p.Published(sequence()) {
			if x.Since.IsZero() || x.Fault != "" || x.Refresh != 20*time.Second {
				return fmt.Errorf("%+v", x)
			}
		}
		return nil
	}
	eventually(t, published)
	if n := len(p.Published(0)); n != 4 {
		t.Fatalf("%d places", n)
	}
	if future := p.Published(sequence() + 1); !future[0].Since.IsZero() {
		t.Errorf("a bundle that there is not yet was published: %+v", future)
	}

	// A new root comes to all of them.
	before := p.Published(sequence())
	if err := h.Trust.AddRoots(t.Context(), anotherRoot(t, "second")); err != nil {
		t.Fatal(err)
	}
	eventually(t, h.everywhere)
	eventually(t, published)
	for i, x := range p.Published(sequence()) {
		if !x.Since.After(before[i].Since) {
			t.Errorf("%s has the new root since %s, and the old one since %s", x.Name, x.Since, before[i].Since)
		}
	}

	// What others change or delete is put back; and readers may have read it, so their time begins anew. In a namespace that is
	// its own affair: those of all others are given no more time for it.
	before = p.Published(sequence())
	edit := []byte(`{"data":{"root-cert.pem":"x","ca-bundle.crt":"","bundle.json":"{}"}}`)
	maps := h.Clientset.CoreV1()
	for ns, name := range map[string]string{h.namespace: "istio-ca-root-cert", "meshca": "meshca-trust"} {
		must(maps.ConfigMaps(ns).Patch(t.Context(), name, types.MergePatchType, edit, metav1.PatchOptions{}))(t)
	}
	if err := maps.ConfigMaps("linkerd").Delete(t.Context(), "linkerd-identity-trust-roots", metav1.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	foreign := anotherRoot(t, "the thief's")
	text := fmt.Sprintf(`{"spec":{"trustBundle":%q}}`, pemOf(foreign))
	must(h.Clientset.CertificatesV1beta1().ClusterTrustBundles().Patch(t.Context(), "meshca.io:workload:bundle", types.MergePatchType, []byte(text), metav1.PatchOptions{}))(t)
	eventually(t, h.everywhere)
	eventually(t, func() error {
		for i, x := range p.Published(sequence()) {
			if strings.Contains(x.Name, "/*/") == x.Since.After(before[i].Since) {
				return fmt.Errorf("%s: since %s, before %s", x.Name, x.Since, before[i].Since)
			}
		}
		return nil
	})
	istio := p.Published(sequence())[3]

	// A new namespace has Istio's at once.
	must(h.CreateNamespace(t.Context(), h.namespace+"-late"))(t)
	eventually(t, func() error {
		_, err := h.configMap(h.namespace+"-late", "istio-ca-root-cert", "root-cert.pem")
		return err
	})
	if now := p.Published(sequence())[3]; now != istio {
		t.Errorf("with a new namespace a rollout is told %+v, before %+v", now, istio)
	}
}

func pemOf(c *x509.Certificate) string {
	return string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: c.Raw}))
}

// What was there before and is not ours is left as it is, and named; once it is handed over it is ours.
func TestPublishOverSomebodyElses(t *testing.T) {
	t.Cleanup(func() { sweep(t, shared) })
	h := newHouse(t, shared, "", "meshca")
	theirs := &corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Name: "linkerd-identity-trust-roots"}, Data: map[string]string{"ca-bundle.crt": "theirs", "other": "stays"}}
	must(h.Clientset.CoreV1().ConfigMaps("linkerd").Create(t.Context(), theirs, metav1.CreateOptions{}))(t)
	theirs.Name = "istio-ca-root-cert"
	must(h.Clientset.CoreV1().ConfigMaps(h.namespace).Create(t.Context(), theirs, metav1.CreateOptions{}))(t)
	p := h.publisher(free, nil)
	faulty := func() (names []string) {
		for _, x := range p.Published(1) {
			if x.Fault != "" && x.Since.IsZero() {
				names = append(names, x.Name+": "+x.Fault)
			}
		}
		return names
	}
	// Linkerd's is one place, and holds a rollout; one namespace's of Istio's does not.
	apart := func() (all []kubesigner.Publication) {
		return slices.DeleteFunc(p.Status(), func(x kubesigner.Publication) bool { return !x.Apart })
	}
	eventually(t, func() error {
		f, a := faulty(), apart()
		if len(f) != 1 || !strings.Contains(f[0], "one/configmap/linkerd/linkerd-identity-trust-roots: ") ||
			!strings.Contains(f[0], "kubectl annotate --namespace linkerd configmap linkerd-identity-trust-roots meshca.io/trust-domain=mesh.test") {
			return fmt.Errorf("%q", f)
		}
		if len(a) != 1 || a[0].Name != "one/configmap/"+h.namespace+"/istio-ca-root-cert" || !strings.Contains(a[0].Fault, "somebody else's") {
			return fmt.Errorf("%+v", a)
		}
		return nil
	})
	if x := p.Published(1); len(x) != 4 || x[3].Since.IsZero() {
		t.Errorf("a rollout is told %+v", x)
	}
	if text, err := h.configMap("linkerd", "linkerd-identity-trust-roots", "ca-bundle.crt"); err != nil || text != "theirs" {
		t.Fatalf("%q, %v", text, err)
	}
	eventually(t, func() error { _, err := h.configMap("default", "istio-ca-root-cert", "root-cert.pem"); return err }) // the others have it
	hand := []byte(`{"metadata":{"annotations":{"meshca.io/trust-domain":"mesh.test"}}}`)
	for ns, name := range map[string]string{"linkerd": "linkerd-identity-trust-roots", h.namespace: "istio-ca-root-cert"} {
		must(h.Clientset.CoreV1().ConfigMaps(ns).Patch(t.Context(), name, types.MergePatchType, hand, metav1.PatchOptions{}))(t)
	}
	eventually(t, h.everywhere)
	eventually(t, func() error {
		if f, a := faulty(), apart(); len(f)+len(a) > 0 {
			return fmt.Errorf("%q, %+v", f, a)
		}
		return nil
	})
	if text, err := h.configMap("linkerd", "linkerd-identity-trust-roots", "other"); err != nil || text != "stays" {
		t.Errorf("what else was in it: %q, %v", text, err)
	}
}

// A CA whose store is an old one does not take back what it published before it lost its memory, and one that knows so
// publishes nothing.
func TestPublishFromAnOldStore(t *testing.T) {
	t.Cleanup(func() { sweep(t, shared) })
	h := newHouse(t, shared, "", "meshca")
	only := func(c *kubesigner.PublishConfig) { c.ClusterTrustBundle, c.Linkerd, c.Istio = nil, nil, nil }
	bundle, _ := h.Trust.Bundle()
	has, _ := bundle.SequenceNumber()
	newer := &corev1.ConfigMap{
		ObjectMeta: metav1.ObjectMeta{Name: "meshca-trust", Annotations: map[string]string{"meshca.io/trust-domain": "mesh.test", "meshca.io/bundle-sequence": fmt.Sprint(has + 8)}},
		Data:       map[string]string{"bundle.json": "of later"},
	}
	must(h.Clientset.CoreV1().ConfigMaps("meshca").Create(t.Context(), newer, metav1.CreateOptions{}))(t)
	p := h.publisher(free, only)
	eventually(t, func() error {
		if x := p.Published(1)[0]; !x.Since.IsZero() || !strings.Contains(x.Fault, fmt.Sprintf("holds the trust bundle %d, and this CA has %d:", has+8, has)) {
			return fmt.Errorf("%+v", x)
		}
		return nil
	})
	if text, err := h.configMap("meshca", "meshca-trust", "bundle.json"); err != nil || text != "of later" {
		t.Fatalf("%q, %v", text, err)
	}
	must(h.Trust.RaiseSequence(t.Context(), has+99))(t) // as accept-rollback does
	eventually(t, func() error {
		if x := p.Published(has + 99)[0]; x.Since.IsZero() {
			return fmt.Errorf("%+v", x)
		}
		return nil
	})

	held := newHouse(t, shared, "", "meshca")
	q := held.publisher(func() error { return errors.New("it is an old one") }, only)
	eventually(t, func() error {
		if x := q.Published(1)[0]; x.Fault != "it is an old one" || !x.Since.IsZero() {
			return fmt.Errorf("%+v", x)
		}
		return nil
	})
}

// What the cluster does not serve nobody can read there: it is told of, and no rollout waits for it.
func TestPublishWhatIsNotServed(t *testing.T) {
	c := kube.Start(t)
	if err := allow(t.Context(), c, "meshca", "meshca-trust meshca", "meshca-trust linkerd"); err != nil {
		t.Fatal(err)
	}
	h := newHouse(t, c, "", "meshca")
	p := h.publisher(free, func(c *kubesigner.PublishConfig) { c.Agents, c.Linkerd = nil, nil })
	eventually(t, func() error {
		st, waits := p.Status(), p.Published(1)
		if !st[0].NotServed || st[0].Fault == "" || len(waits) != 1 || waits[0].Since.IsZero() || !strings.Contains(waits[0].Name, "istio") {
			return fmt.Errorf("%+v, %+v", st, waits)
		}
		return nil
	})
	c.Stop()
	if err := c.StartAgain(t.Context(), kube.WithPodCertificates()...); err != nil {
		t.Fatal(err)
	}
	eventually(t, func() error { _, err := h.trustBundle(); return err })
	eventually(t, func() error {
		if n := len(p.Published(1)); n != 2 {
			return fmt.Errorf("%d places", n)
		}
		return nil
	})
}

// What lacks its rights says which, and works as soon as it has them.
func TestRightsThatAreMissing(t *testing.T) {
	if err := allow(t.Context(), shared, "poor", "meshca-podcertificates", "meshca-signingrequests", "meshca-clustertrustbundle", "meshca-trust meshca",
		"meshca-trust linkerd", "meshca-istio-trust"); err != nil {
		t.Fatal(err)
	}
	h := newHouse(t, shared, "", "poor")
	s, p := h.signer("ca-0"), h.publisher(free, nil)
	eventually(t, func() error {
		for _, d := range s.Status() {
			if d.State != "forbidden" || !strings.Contains(d.Why, "may not list "+d.API) {
				return fmt.Errorf("%+v", d)
			}
		}
		for _, x := range p.Published(1) {
			if !strings.Contains(x.Fault, "forbidden") || !x.Since.IsZero() {
				return fmt.Errorf("%+v", x)
			}
		}
		return nil
	})
	r := h.podRequest(nil)
	if err := allow(t.Context(), shared, "poor", "meshca", "meshca-signingrequests", "meshca-clustertrustbundle", "meshca-trust meshca", "meshca-trust linkerd",
		"meshca-istio-trust"); err != nil {
		t.Fatal(err)
	}
	if got := h.answered(r).Status.Conditions[0]; got.Type != "Issued" {
		t.Errorf("%+v", got)
	}
	if d := s.Status()[1]; d.State != "forbidden" {
		t.Errorf("%+v", d)
	}
}
