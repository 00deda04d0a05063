// Package podcert_test gives pods of a real node their identities without any agent: by podCertificate and
// clusterTrustBundle volumes, from a CA that is a pod of the same cluster and has no more rights than the documentation
// names.
package podcert_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/meshca/meshca/test/node"
	"github.com/meshca/meshca/test/parts"
)

const theCA = `
apiVersion: v1
kind: ConfigMap
metadata: {name: meshca, namespace: meshca}
data:
  meshca.yaml: |
    trustDomain: mesh.test
    stateDir: /state/ca
    adminSocket: /state/ca/admin.sock
    opsAddress: ":9090"
    policyFile: /config/policy.yaml
    upstream: {disk: {}}
    clusters:
    - name: prod
      mode: jwks
      signers: {podCertificateRequests: true}
      publish: {clusterTrustBundle: {}, agents: {}, refresh: 40s}
  policy.yaml: |
    rules:
    - {name: closed, serviceAccounts: [shut], deny: true}
    - {}
---
apiVersion: v1
kind: Pod
metadata: {name: meshca-0, namespace: meshca}
spec:
  serviceAccountName: meshca
  terminationGracePeriodSeconds: 5
  securityContext: {runAsNonRoot: true, fsGroup: 65532}
  initContainers:
  - name: root
    image: localhost/meshca:test
    imagePullPolicy: Never
    args: [root, create, --config, /config/meshca.yaml]
    volumeMounts: [{name: config, mountPath: /config}, {name: state, mountPath: /state}]
  containers:
  - name: ca
    image: localhost/meshca:test
    imagePullPolicy: Never
    args: [serve, --config, /config/meshca.yaml]
    readinessProbe: {httpGet: {path: /readyz, port: 9090}, periodSeconds: 1}
    volumeMounts: [{name: config, mountPath: /config}, {name: state, mountPath: /state}]
  volumes:
  - {name: config, configMap: {name: meshca}}
  - {name: state, emptyDir: {}}
`

// pod is one with an identity in a volume, and no agent.
func pod(name, account, command string) string {
	return `
apiVersion: v1
kind: ServiceAccount
metadata: {name: ` + account + `}
---
apiVersion: v1
kind: Pod
metadata: {name: ` + name + `, labels: {app: ` + name + `}}
spec:
  serviceAccountName: ` + account + `
  terminationGracePeriodSeconds: 1
  containers:
  - name: c
    image: localhost/inpod:test
    imagePullPolicy: Never
    command: ` + command + `
    volumeMounts: [{name: identity, mountPath: /identity}]
  volumes:
  - name: identity
    projected:
      sources:
      - podCertificate: {signerName: meshca.io/workload, keyType: ECDSAP256, credentialBundlePath: credentials.pem}
      - clusterTrustBundle: {signerName: meshca.io/workload, labelSelector: {}, path: trust.pem}
---
`
}

// TestPodsWithoutAnAgent is one node's life, in steps that build on each other.
func TestPodsWithoutAnAgent(t *testing.T) {
	n := node.Start(t)
	c := &cluster{Node: n, t: t}
	c.install()
	// 1. Two pods speak mTLS, each as its own service account.
	c.apply(pod("server", "bank", `["/inpod", "serve-mtls", ":8443", "/identity"]`) + pod("client", "shop", `["/inpod", "pause"]`) + `
apiVersion: v1
kind: Service
metadata: {name: bank}
spec: {selector: {app: server}, ports: [{port: 443, targetPort: 8443}]}
`)
	c.ready("server")
	c.ready("client")
	first := c.call()
	if first.server != "spiffe://mesh.test/ns/default/sa/bank" || first.client != "spiffe://mesh.test/ns/default/sa/shop" || first.roots != "1" {
		t.Fatalf("got %+v", first)
	}
	// 2. One that policy refuses does not start, and people see why where they look.
	c.apply(pod("outcast", "shut", `["/inpod", "pause"]`))
	c.await("the refusal to be seen", func(ctx context.Context) error {
		events, err := n.Kubectl(ctx, "events", "--for=pod/outcast")
		if err == nil && (!strings.Contains(events, "POLICY_DENIED") || !strings.Contains(events, "closed")) {
			err = fmt.Errorf("the pod's events: %s", events)
		}
		return err
	})
	if text := c.kubectl("get", "podcertificaterequests", "-o", "yaml"); !strings.Contains(text, "POLICY_DENIED") {
		t.Errorf("the requests do not say it: %s", text)
	}
	if text := c.certctl("explain", "pod", "default/outcast"); !strings.Contains(text, "POLICY_DENIED") {
		t.Errorf("certctl does not explain it: %s", text)
	}
	// 3. Kubelet renews, here because it was restarted; the pods take the new certificate without a word to them.
	c.renew()
	second := c.untilOther(first)
	// 4. The root is replaced: what pods trust first has both, then what they show is below the new one. They speak all the
	// while, each as far as it has come.
	c.certctl("ca", "rotate", "root")
	c.await("the rollout to wait for the readers of what is published", func(context.Context) error {
		text := c.certctl("ca", "status")
		if !strings.Contains(text, "reader prod/clustertrustbundle/meshca.io:workload:bundle") {
			return fmt.Errorf("%s", text)
		}
		return nil
	})
	c.await("the pods to trust both roots", func(context.Context) error {
		if got, err := c.try(); err != nil || got.roots != "2" {
			return fmt.Errorf("%+v, %w", got, err)
		}
		return nil
	})
	if text := c.certctl("ca", "status"); !strings.Contains(text, "published") {
		t.Errorf("pods had the new root after it signed: %s", text)
	}
	c.await("the new root to sign", func(context.Context) error {
		c.call()
		if text := c.certctl("ca", "status"); !strings.Contains(text, "retired") {
			return fmt.Errorf("%s", text)
		}
		return nil
	})
	c.renew()
	if third := c.untilOther(second); third.roots != "2" {
		t.Errorf("got %+v", third)
	}
	if text := c.kubectl("get", "configmap", "--namespace", "meshca", "meshca-trust", "-o", "jsonpath={.data.bundle\\.json}"); strings.Count(text, `"x509-svid"`) != 2 {
		t.Errorf("the agents' bundle: %s", text)
	}
}

type cluster struct {
	*node.Node
	t *testing.T
}

// install runs the CA as a pod, with the documented rights.
func (c *cluster) install() {
	c.t.Helper()
	ctx := c.t.Context()
	image, err := node.CA(ctx, c.Dir())
	if err == nil {
		err = c.Import(ctx, image)
	}
	if err != nil {
		c.t.Fatal(err)
	}
	c.kubectl("create", "namespace", "meshca")
	c.kubectl("create", "serviceaccount", "--namespace", "meshca", "meshca")
	root, err := parts.Root()
	if err != nil {
		c.t.Fatal(err)
	}
	for _, file := range []string{"kubernetes-rights.yaml", "kubernetes-signers-rights.yaml"} {
		text, err := os.ReadFile(filepath.Join(root, "docs", "examples", file))
		if err != nil {
			c.t.Fatal(err)
		}
		for _, doc := range strings.Split(string(text), "\n---\n") {
			if !strings.Contains(doc, "namespace: linkerd") && !strings.Contains(doc, "kind: ClusterRoleBinding") {
				c.apply(doc)
			}
		}
	}
	for _, role := range []string{"meshca", "meshca-podcertificates", "meshca-clustertrustbundle"} {
		c.kubectl("create", "clusterrolebinding", role, "--clusterrole="+role, "--serviceaccount=meshca:meshca")
	}
	c.kubectl("create", "rolebinding", "--namespace", "meshca", "meshca-trust", "--role=meshca-trust", "--serviceaccount=meshca:meshca")
	c.apply(theCA)
	if err := c.PodReady(ctx, "meshca", "meshca-0"); err != nil {
		c.t.Fatal(err)
	}
}

// answer is what one call from the client to the server showed.
type answer struct{ server, client, serial, roots string }

func (c *cluster) try() (a answer, err error) {
	text, err := c.Exec(c.t.Context(), "default", "client", "/inpod", "fetch-mtls", "https://bank", "/identity")
	if err == nil {
		_, err = fmt.Sscan(text, &a.server, &a.client, &a.serial, &a.roots)
	}
	return a, err
}

// call must succeed, but for a Service that is not there yet.
func (c *cluster) call() (a answer) {
	c.t.Helper()
	c.await("an answer", func(context.Context) (err error) {
		if a, err = c.try(); err != nil && !strings.Contains(err.Error(), "no such host") && !strings.Contains(err.Error(), "refused") {
			c.t.Fatal(err)
		}
		return err
	})
	return a
}

// renew has kubelet ask for new certificates: it keeps none over its own restart.
func (c *cluster) renew() {
	c.t.Helper()
	if err := errors.Join(c.StopProgram(c.t.Context(), "kubelet"), c.StartProgram(c.t.Context(), "kubelet")); err != nil {
		c.t.Fatal(err)
	}
}

// untilOther waits until the server shows another certificate. No call may fail for a certificate meanwhile.
func (c *cluster) untilOther(before answer) (now answer) {
	c.t.Helper()
	c.await("another certificate", func(context.Context) (err error) {
		now, err = c.try()
		switch {
		case err != nil && (strings.Contains(err.Error(), "tls:") || strings.Contains(err.Error(), "x509")):
			c.t.Fatal(err)
		case err == nil && now.serial == before.serial:
			err = fmt.Errorf("still %s", now.serial)
		}
		return err
	})
	return now
}

func (c *cluster) apply(manifest string) {
	c.t.Helper()
	if err := c.Apply(c.t.Context(), manifest); err != nil {
		c.t.Fatal(err)
	}
}

func (c *cluster) ready(pod string) {
	c.t.Helper()
	if err := c.PodReady(c.t.Context(), "default", pod); err != nil {
		logs, _ := c.PodLogs(context.WithoutCancel(c.t.Context()), "meshca", "meshca-0")
		c.t.Fatalf("%v\n%s", err, logs)
	}
}

func (c *cluster) kubectl(args ...string) string {
	c.t.Helper()
	text, err := c.Kubectl(c.t.Context(), args...)
	if err != nil {
		c.t.Fatal(err)
	}
	return text
}

func (c *cluster) certctl(args ...string) string {
	c.t.Helper()
	text, err := c.Exec(c.t.Context(), "meshca", "meshca-0", append([]string{"/certctl", "--socket", "/state/ca/admin.sock"}, args...)...)
	if err != nil {
		c.t.Fatal(err)
	}
	return text
}

func (c *cluster) await(what string, condition func(context.Context) error) {
	c.t.Helper()
	ctx, cancel := context.WithTimeout(c.t.Context(), 3*time.Minute)
	defer cancel()
	if err := c.Await(ctx, what, condition); err != nil {
		c.t.Fatal(err)
	}
}
