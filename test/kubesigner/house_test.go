// Package kubesigner_test has the CA answer a real API server's requests for certificates, and publish its trust there, with
// no more rights than the documentation names.
package kubesigner_test

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	certificatesv1beta1 "k8s.io/api/certificates/v1beta1"
	corev1 "k8s.io/api/core/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/yaml"

	"github.com/meshca/meshca/api/kubesigner"
	"github.com/meshca/meshca/attestor/kubernetes"
	"github.com/meshca/meshca/ca/registration"
	"github.com/meshca/meshca/test/kube"
	"github.com/meshca/meshca/test/parts"
	"github.com/meshca/meshca/test/world"
)

const signerName = "meshca.io/workload"

// shared is a cluster with PodCertificateRequests and ClusterTrustBundles. TestMain owns it.
var shared *kube.Cluster

func TestMain(m *testing.M) { os.Exit(runAll(m)) }

func runAll(m *testing.M) int {
	dir, err := os.MkdirTemp("", "meshca-kubesigner-")
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	defer os.RemoveAll(dir)
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
	defer cancel()
	if shared, err = launch(ctx, dir); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	defer shared.Close()
	return m.Run()
}

func launch(ctx context.Context, dir string) (*kube.Cluster, error) {
	c, err := kube.Launch(ctx, dir)
	if err != nil {
		return nil, err
	}
	c.Stop()
	if err = c.StartAgain(ctx, kube.WithPodCertificates()...); err == nil {
		_, err = c.CreateNamespace(ctx, "meshca")
	}
	if err == nil {
		_, err = c.CreateNamespace(ctx, "linkerd")
	}
	if err == nil {
		err = allow(ctx, c, "meshca")
	}
	if err != nil {
		c.Close()
	}
	return c, err
}

// allow gives a user the rights that the documentation names, but for those that skip tells.
func allow(ctx context.Context, c *kube.Cluster, user string, skip ...string) error {
	root, err := parts.Root()
	if err != nil {
		return err
	}
	for _, file := range []string{"kubernetes-rights.yaml", "kubernetes-signers-rights.yaml"} {
		text, err := os.ReadFile(filepath.Join(root, "docs", "examples", file))
		if err != nil {
			return err
		}
		for i, doc := range strings.Split(string(text), "\n---\n") {
			var role rbacv1.ClusterRole
			if err := yaml.Unmarshal([]byte(doc), &role); err != nil {
				return err
			}
			if !strings.HasSuffix(role.Kind, "Role") || contains(skip, role.Name+" "+role.Namespace) {
				continue
			}
			if err := bind(ctx, c, fmt.Sprintf("%s-%s-%d", user, strings.TrimSuffix(file, ".yaml"), i), user, &role); err != nil {
				return err
			}
		}
	}
	return nil
}

func contains(list []string, s string) bool {
	for _, x := range list {
		if x == strings.TrimSpace(s) {
			return true
		}
	}
	return false
}

func bind(ctx context.Context, c *kube.Cluster, name, user string, role *rbacv1.ClusterRole) error {
	subjects := []rbacv1.Subject{{APIGroup: rbacv1.GroupName, Kind: rbacv1.UserKind, Name: user}}
	ref := rbacv1.RoleRef{APIGroup: rbacv1.GroupName, Kind: role.Kind, Name: name}
	meta := metav1.ObjectMeta{Name: name, Namespace: role.Namespace}
	rbac := c.Clientset.RbacV1()
	if role.Kind == "Role" {
		_, err := rbac.Roles(role.Namespace).Create(ctx, &rbacv1.Role{ObjectMeta: meta, Rules: role.Rules}, metav1.CreateOptions{})
		_, err2 := rbac.RoleBindings(role.Namespace).Create(ctx, &rbacv1.RoleBinding{ObjectMeta: meta, RoleRef: ref, Subjects: subjects}, metav1.CreateOptions{})
		return errors.Join(err, err2)
	}
	_, err := rbac.ClusterRoles().Create(ctx, &rbacv1.ClusterRole{ObjectMeta: meta, Rules: role.Rules}, metav1.CreateOptions{})
	_, err2 := rbac.ClusterRoleBindings().Create(ctx, &rbacv1.ClusterRoleBinding{ObjectMeta: meta, RoleRef: ref, Subjects: subjects}, metav1.CreateOptions{})
	return errors.Join(err, err2)
}

// house is a CA for one cluster, with a namespace, an account, a node and a pod of its own there.
type house struct {
	*kube.Cluster
	*world.World
	t         *testing.T
	attestor  *kubernetes.Cluster
	ra        *registration.Authority
	namespace string
	account   *corev1.ServiceAccount
	node      *corev1.Node
	pod       *corev1.Pod
}

func newHouse(t *testing.T, c *kube.Cluster, rules, user string) *house {
	t.Helper()
	h := &house{Cluster: c, World: world.New(t, rules), t: t, namespace: fmt.Sprintf("ns-%x", time.Now().UnixNano())}
	kubeconfig := must(c.KubeconfigFor(user))(t)
	h.attestor = must(kubernetes.New(kubernetes.Config{Name: world.Cluster, Mode: kubernetes.JWKS, Kubeconfig: kubeconfig}, kubernetes.Deps{}))(t)
	h.background(func(ctx context.Context) { _ = h.attestor.Run(ctx) })
	conf := h.RA.Config
	conf.Clusters = map[string]registration.Member{world.Cluster: {Cluster: h.attestor, Agents: []string{"meshca/meshca-agent"}}}
	h.ra = must(registration.New(conf))(t)
	must(c.CreateNamespace(t.Context(), h.namespace))(t)
	h.account = must(c.CreateServiceAccount(t.Context(), h.namespace, "web"))(t)
	h.node = must(c.CreateNode(t.Context(), h.namespace+"-node"))(t)
	h.pod = must(c.CreatePod(t.Context(), h.namespace, "web-1", "web", h.node.Name))(t)
	return h
}

// background runs something until the test ends.
func (h *house) background(run func(context.Context)) {
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan struct{})
	go func() { defer close(ended); run(ctx) }()
	h.t.Cleanup(func() { cancel(); <-ended })
}

// signer runs a Signer for both kinds of request.
func (h *house) signer(replica string) *kubesigner.Signer {
	h.t.Helper()
	s := must(kubesigner.NewSigner(kubesigner.SignerOptions{
		Cluster: world.Cluster, Config: kubesigner.Config{PodCertificateRequests: true, CertificateSigningRequests: true}, Connection: h.attestor,
		Registration: h.ra, Replica: replica, Log: slog.New(slog.NewTextHandler(testLog{h.t}, nil)), Every: 200 * time.Millisecond,
	}))(h.t)
	h.background(s.Run)
	return s
}

// testLog prints log lines with the test's.
type testLog struct{ t *testing.T }

func (l testLog) Write(p []byte) (int, error) {
	l.t.Log(strings.TrimSpace(string(p)))
	return len(p), nil
}

// podRequest is what a kubelet makes for the house's pod.
func (h *house) podRequest(change func(*certificatesv1beta1.PodCertificateRequest)) *certificatesv1beta1.PodCertificateRequest {
	h.t.Helper()
	r := &certificatesv1beta1.PodCertificateRequest{
		ObjectMeta: metav1.ObjectMeta{GenerateName: "req-"},
		Spec: certificatesv1beta1.PodCertificateRequestSpec{
			SignerName: signerName, PodName: h.pod.Name, PodUID: h.pod.UID, ServiceAccountName: "web", ServiceAccountUID: h.account.UID,
			NodeName: "", NodeUID: h.node.UID, StubPKCS10Request: stubRequest(h.t, nil),
		},
	}
	r.Spec.NodeName = nodeName(h.node.Name)
	if change != nil {
		change(r)
	}
	return must(h.Clientset.CertificatesV1beta1().PodCertificateRequests(h.namespace).Create(h.t.Context(), r, metav1.CreateOptions{}))(h.t)
}

// answered waits for a condition of a pod's request.
func (h *house) answered(r *certificatesv1beta1.PodCertificateRequest) *certificatesv1beta1.PodCertificateRequest {
	h.t.Helper()
	var now *certificatesv1beta1.PodCertificateRequest
	eventually(h.t, func() (err error) {
		now, err = h.Clientset.CertificatesV1beta1().PodCertificateRequests(h.namespace).Get(h.t.Context(), r.Name, metav1.GetOptions{})
		if err == nil && len(now.Status.Conditions) == 0 {
			err = errors.New("it has no condition")
		}
		return err
	})
	return now
}

func eventually(t *testing.T, check func() error) {
	t.Helper()
	deadline := time.Now().Add(time.Minute)
	for {
		err := check()
		if err == nil {
			return
		}
		if time.Now().After(deadline) {
			t.Fatal(err)
		}
		time.Sleep(50 * time.Millisecond)
	}
}

func must[T any](v T, err error) func(*testing.T) T {
	return func(t *testing.T) T {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		return v
	}
}
