package helm_test

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	authenticationv1 "k8s.io/api/authentication/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/meshca/meshca/test/helm"
	"github.com/meshca/meshca/test/node"
	"github.com/meshca/meshca/test/vault"
)

const (
	// vaultAddress is the node's, which its pods reach.
	vaultAddress = "10.99.0.1:8200"
	// inParts is where the node finds the real parts.
	inParts = "/run/parts"
)

// inVault installs the chart with its root in a Vault that was set up by the documented commands, with the login of the CA's
// own service account, and replaces the root while proxies send requests.
func inVault(t *testing.T, s *helm.Site) {
	ctx := t.Context()
	startVault(t, s)
	administer(t, s, "## 1. The root", "## 2. What meshca may do", "### Kubernetes")
	check(t, s.Volume(ctx, "ca-with-vault"))
	values := filepath.Join(s.Dir(), "vault-values.yaml")
	// Short lives and a short refresh: the rollout waits for the last certificate under the old root, and for readers.
	check(t, os.WriteFile(values, []byte(`
trust: {refresh: 10s}
ca:
  upstream:
    vault:
      address: https://`+vaultAddress+`
      caFile: /etc/vault/ca.pem
      mount: pki_mesh
      issuer: root-1
      auth: {kubernetes: {role: meshca}}
  config: {svid: {ttl: 1m}}
  extraVolumes: [{name: vault-ca, configMap: {name: vault-ca}}]
  extraVolumeMounts: [{name: vault-ca, mountPath: /etc/vault, readOnly: true}]
`), 0o600))
	_, err := s.Kubectl(ctx, "create", "namespace", helm.Namespace)
	check(t, err)
	_, err = s.Kubectl(ctx, "--namespace", helm.Namespace, "create", "configmap", "vault-ca", "--from-file=ca.pem="+filepath.Join(s.Dir(), "vault", "tls", "vault-ca.pem"))
	check(t, err)
	neverReady(t, s, values)
	check(t, s.Upgrade(ctx, "--values", values))
	check(t, s.ApplyExample(ctx, strict(t, s)))
	check(t, s.Send(ctx, "traffic", "visitor", rate))
	check(t, s.PodReady(ctx, "demo", "traffic"))
	first := onlyRoot(t, s)

	administer(t, s, "## The next root")
	patient, cancel := context.WithTimeout(ctx, 8*time.Minute)
	defer cancel()
	told, err := s.Certctl(patient, "ca", "rotate", "root", "--issuer", "root-2", "--watch")
	if err != nil {
		t.Fatalf("%v\n%s", err, told)
	}
	t.Logf("certctl ca rotate root --issuer root-2 --watch:\n%s", told)
	if second := onlyRoot(t, s); second == first {
		t.Errorf("the root that signs is %s still", second)
	}
	if sent := unbroken(t, s, "traffic"); sent.Answers < 2 {
		t.Errorf("%d certificates were seen under two roots", sent.Answers)
	}
	starts(t, s)
	_, err = s.Kubectl(ctx, "delete", "namespace", "demo", "--timeout=3m")
	check(t, err)
	check(t, s.Uninstall(ctx))
}

// neverReady installs the chart with a role that Vault does not know, so that the CA has nothing to sign with and never was ready.
// An upgrade mends it only if a pod that is not ready is rolled, too: what holds that up is seen in a real StatefulSet alone.
func neverReady(t *testing.T, s *helm.Site, values string) {
	t.Helper()
	ctx := t.Context()
	check(t, s.Begin(ctx, "--values", values, "--set", "ca.upstream.vault.auth.kubernetes.role=meshka"))
	await(t, s, 3*time.Minute, "the CA to say that it cannot sign", func(ctx context.Context) error {
		pod, err := s.Clientset.CoreV1().Pods(helm.Namespace).Get(ctx, "meshca-0", metav1.GetOptions{})
		if err != nil {
			return err
		}
		for _, c := range pod.Status.ContainerStatuses {
			if c.Ready {
				t.Fatalf("container %s is ready though Vault refuses the login", c.Name)
			}
		}
		log, err := s.Kubectl(ctx, "--namespace", helm.Namespace, "logs", "meshca-0")
		if err == nil && !strings.Contains(log, "meshka") {
			err = fmt.Errorf("its log is\n%s", log)
		}
		return err
	})
}

// startVault has a Vault run on the node, which the node's pods reach and which reaches the API server.
func startVault(t *testing.T, s *helm.Site) {
	t.Helper()
	ctx := t.Context()
	dir := filepath.Join(s.Dir(), "vault")
	check(t, os.MkdirAll(filepath.Join(dir, "tls"), 0o700))
	check(t, vault.InstallPlugin(filepath.Join(dir, "plugins")))
	check(t, os.CopyFS(filepath.Join(dir, "documented"), os.DirFS(filepath.Join(s.Root, "deploy", "vault"))))
	check(t, s.AddProgram(ctx, "vault", inParts+"/vault", "server", "-dev", "-dev-no-store-token", "-dev-root-token-id=administrator",
		"-dev-tls", "-dev-tls-cert-dir="+node.Inner+"/vault/tls", "-dev-tls-san=10.99.0.1", "-dev-plugin-dir="+node.Inner+"/vault/plugins", "-dev-listen-address="+vaultAddress))
	check(t, s.StartProgram(ctx, "vault"))
	await(t, s, time.Minute, "Vault", func(ctx context.Context) error {
		_, err := shell(ctx, t, s, "vault status")
		return err
	})
}

// administer runs the documented commands under these headings, as the one who administers Vault would.
func administer(t *testing.T, s *helm.Site, headings ...string) {
	t.Helper()
	ctx := t.Context()
	for _, heading := range headings {
		commands := must(vault.Commands(heading))(t)
		if strings.Contains(commands, "reviewer.jwt") {
			reviewer(t, s)
		}
		if _, err := shell(ctx, t, s, commands); err != nil {
			t.Fatalf("%s: %v", heading, err)
		}
	}
}

func shell(ctx context.Context, t *testing.T, s *helm.Site, commands string) (string, error) {
	t.Helper()
	return s.Inside(ctx, "env", "PATH="+inParts+":"+os.Getenv("PATH"), "HOME="+node.Inner+"/vault", "VAULT_ADDR=https://"+vaultAddress,
		"VAULT_TOKEN=administrator", "VAULT_CACERT="+node.Inner+"/vault/tls/vault-ca.pem", "KUBERNETES_HOST=https://10.96.0.1", "KUBERNETES_CA="+node.Inner+"/vault/kubernetes-ca.pem",
		"bash", "-euo", "pipefail", "-c", "cd "+node.Inner+"/vault/documented\n"+commands)
}

// reviewer writes the files that Vault's Kubernetes auth is given: a token of one who may review tokens, and the API server's CA.
func reviewer(t *testing.T, s *helm.Site) {
	t.Helper()
	ctx := t.Context()
	check(t, s.Apply(ctx, `
apiVersion: v1
kind: ServiceAccount
metadata: {name: vault, namespace: default}
---
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRoleBinding
metadata: {name: vault}
roleRef: {apiGroup: rbac.authorization.k8s.io, kind: ClusterRole, name: system:auth-delegator}
subjects: [{kind: ServiceAccount, name: vault, namespace: default}]
`))
	token := must(s.Clientset.CoreV1().ServiceAccounts("default").CreateToken(ctx, "vault", &authenticationv1.TokenRequest{}, metav1.CreateOptions{}))(t).Status.Token
	var ca *corev1.ConfigMap
	await(t, s, time.Minute, "the API server's CA", func(ctx context.Context) (err error) {
		ca, err = s.Clientset.CoreV1().ConfigMaps("default").Get(ctx, "kube-root-ca.crt", metav1.GetOptions{})
		return err
	})
	check(t, os.WriteFile(filepath.Join(s.Dir(), "vault", "documented", "reviewer.jwt"), []byte(token), 0o600))
	check(t, os.WriteFile(filepath.Join(s.Dir(), "vault", "kubernetes-ca.pem"), []byte(ca.Data["ca.crt"]), 0o600))
}

// onlyRoot is the ID of the one root that is trusted, which signs.
func onlyRoot(t *testing.T, s *helm.Site) string {
	t.Helper()
	var status struct {
		Roots []struct{ ID, State, Issuer string }
	}
	text := must(s.Certctl(t.Context(), "ca", "status", "-o", "json"))(t)
	check(t, json.Unmarshal([]byte(text), &status))
	if len(status.Roots) != 1 || status.Roots[0].State != "signing" || status.Roots[0].Issuer == "" {
		t.Fatalf("the roots are %+v:\n%s", status.Roots, text)
	}
	return fmt.Sprintf("%s (%s)", status.Roots[0].ID, status.Roots[0].Issuer)
}
