package vault_test

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"fmt"
	"math/big"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/hashicorp/vault/api"
	"sigs.k8s.io/yaml"

	rbacv1 "k8s.io/api/rbac/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	upstream "github.com/meshca/meshca/ca/upstream/vault"
	"github.com/meshca/meshca/test/kube"
	"github.com/meshca/meshca/test/parts"
	"github.com/meshca/meshca/test/vault"
)

// TestDocumentedSetup runs the commands of deploy/vault/README.md word for word, against a Vault that has nothing, and has
// an intermediate signed under each of its configurations.
func TestDocumentedSetup(t *testing.T) {
	server := vault.Dev(t)
	cluster := kube.Start(t)
	dir := t.TempDir()
	root, err := parts.Root()
	must(t, err)
	must(t, os.CopyFS(dir, os.DirFS(filepath.Join(root, "deploy", "vault"))))
	text, err := os.ReadFile(filepath.Join(dir, "README.md"))
	must(t, err)

	token := serviceAccount(t, cluster, dir)
	clientCertificate(t, dir)
	commands := fenced(string(text), "sh")
	script := exec.CommandContext(t.Context(), "bash", "-euo", "pipefail", "-c", strings.Join(commands, "\n"))
	script.Dir = dir
	binary := parts.Path(t, "vault")
	script.Env = []string{"PATH=" + filepath.Dir(binary) + ":" + os.Getenv("PATH"), "HOME=" + dir, "VAULT_ADDR=" + server.Address, "VAULT_TOKEN=" + server.RootToken,
		"VAULT_CACERT=" + server.CAFile, "KUBERNETES_HOST=" + cluster.URL, "KUBERNETES_CA=" + cluster.CAFile}
	if out, err := script.CombinedOutput(); err != nil {
		t.Fatalf("%v:\n%s", err, out)
	}
	if len(commands) < 7 {
		t.Fatalf("%d blocks of commands: the README was read wrongly", len(commands))
	}

	var kinds []string
	for _, block := range fenced(string(text), "yaml") {
		var file struct {
			Upstream struct {
				Vault upstream.Config `json:"vault"`
			} `json:"upstream"`
		}
		must(t, yaml.UnmarshalStrict([]byte(block), &file))
		c := file.Upstream.Vault
		// What the machine of the README has elsewhere.
		c.Address, c.CAFile = server.Address, server.CAFile
		here := func(path *string) { *path = filepath.Join(dir, filepath.Base(*path)) }
		kind := "token"
		switch {
		case c.Auth.AppRole != nil:
			kind = "AppRole"
			here(&c.Auth.AppRole.RoleIDFile)
			here(&c.Auth.AppRole.SecretIDFile)
		case c.Auth.Kubernetes != nil:
			kind = "Kubernetes"
			c.Auth.Kubernetes.TokenFile = token
		case c.Auth.Cert != nil:
			kind = "certificate"
			here(&c.Auth.Cert.CertFile)
			here(&c.Auth.Cert.KeyFile)
		default:
			here(&c.Auth.TokenFile)
		}
		kinds = append(kinds, kind)
		t.Run(kind, func(t *testing.T) { setUp(t, c) })
	}
	slices.Sort(kinds)
	if got := strings.Join(kinds, " "); got != "AppRole Kubernetes certificate token" {
		t.Errorf("the README has configurations for %s", got)
	}
}

// setUp has a configuration sign, and its login renewed.
func setUp(t *testing.T, c upstream.Config) {
	var w world
	u, err := upstream.New(c, upstream.Options{Observe: func(c upstream.Call) {
		w.mu.Lock()
		defer w.mu.Unlock()
		w.calls = append(w.calls, c)
	}})
	must(t, err)
	defer u.Close()
	if found := u.Check(t.Context()); len(found) != 0 {
		t.Errorf("check: %+v", found)
	}
	issuers, err := u.Issuers(t.Context())
	must(t, err)
	if len(issuers) != 2 || issuers[0].Name != "root-1" || issuers[1].Name != "root-2" || issuers[1].Fault != nil {
		t.Errorf("issuers: %+v", issuers)
	}
	renew(t, line(t, u, named(t, u)))
	w.t = t
	w.run(u)
	eventually(t, 10*time.Second, func() error { // the LifetimeWatcher begins with a renewal
		if w.made(upstream.OpRenew) == 0 {
			return fmt.Errorf("not renewed: %v", u.Status().LastError)
		}
		return nil
	})
	if st := u.Status(); st.LeaseEnds.IsZero() || st.LastError != nil {
		t.Errorf("status: %+v", st)
	}
}

var fence = regexp.MustCompile("(?ms)^```([a-z]+)\n(.*?)^```$")

// fenced returns the blocks of a language.
func fenced(text, language string) []string {
	var blocks []string
	for _, m := range fence.FindAllStringSubmatch(text, -1) {
		if m[1] == language {
			blocks = append(blocks, m[2])
		}
	}
	return blocks
}

// serviceAccount makes meshca's account in a cluster, and the one with which Vault reviews tokens. It returns the file of
// the first one's token.
func serviceAccount(t *testing.T, c *kube.Cluster, dir string) string {
	t.Helper()
	for _, namespace := range []string{"meshca", "vault"} {
		_, err := c.CreateNamespace(t.Context(), namespace)
		must(t, err)
	}
	_, err := c.CreateServiceAccount(t.Context(), "meshca", "meshca")
	must(t, err)
	_, err = c.CreateServiceAccount(t.Context(), "vault", "reviewer")
	must(t, err)
	_, err = c.Clientset.RbacV1().ClusterRoleBindings().Create(t.Context(), &rbacv1.ClusterRoleBinding{
		ObjectMeta: metav1.ObjectMeta{Name: "vault-reviewer"},
		RoleRef:    rbacv1.RoleRef{APIGroup: rbacv1.GroupName, Kind: "ClusterRole", Name: "system:auth-delegator"},
		Subjects:   []rbacv1.Subject{{Kind: rbacv1.ServiceAccountKind, Namespace: "vault", Name: "reviewer"}},
	}, metav1.CreateOptions{})
	must(t, err)
	reviewer, err := c.Token(t.Context(), "vault", "reviewer", nil, "", time.Hour)
	must(t, err)
	must(t, os.WriteFile(filepath.Join(dir, "reviewer.jwt"), []byte(reviewer), 0o600))
	ours, err := c.Token(t.Context(), "meshca", "meshca", nil, "vault", time.Hour)
	must(t, err)
	file := filepath.Join(dir, "vault-token")
	must(t, os.WriteFile(file, []byte(ours), 0o600))
	return file
}

// clientCertificate makes client-ca.pem, client.pem and client.key.
func clientCertificate(t *testing.T, dir string) {
	t.Helper()
	make := func(name string, isCA bool, parent *x509.Certificate, signer *ecdsa.PrivateKey) (*x509.Certificate, *ecdsa.PrivateKey) {
		key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
		must(t, err)
		template := &x509.Certificate{SerialNumber: big.NewInt(time.Now().UnixNano()), Subject: pkix.Name{CommonName: name}, NotBefore: time.Now().Add(-time.Minute),
			NotAfter: time.Now().Add(time.Hour), IsCA: isCA, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageDigitalSignature | x509.KeyUsageCertSign,
			ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}}
		if !isCA {
			template.KeyUsage, template.DNSNames = x509.KeyUsageDigitalSignature, []string{name}
		}
		if parent == nil {
			parent, signer = template, key
		}
		der, err := x509.CreateCertificate(rand.Reader, template, parent, key.Public(), signer)
		must(t, err)
		c, err := x509.ParseCertificate(der)
		must(t, err)
		return c, key
	}
	caCert, caKey := make("client CA", true, nil, nil)
	cert, key := make("meshca.example", false, caCert, caKey)
	writePEM(t, filepath.Join(dir, "client-ca.pem"), "CERTIFICATE", caCert.Raw)
	writePEM(t, filepath.Join(dir, "client.pem"), "CERTIFICATE", cert.Raw)
	der, err := x509.MarshalPKCS8PrivateKey(key)
	must(t, err)
	writePEM(t, filepath.Join(dir, "client.key"), "PRIVATE KEY", der)
}

func writePEM(t *testing.T, path, kind string, der []byte) {
	t.Helper()
	must(t, os.WriteFile(path, pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der}), 0o600))
}

func mountOf(kind string) *api.MountInput { return &api.MountInput{Type: kind} }
