package helm_test

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/meshca/meshca/test/figures"
	"github.com/meshca/meshca/test/helm"
	"github.com/meshca/meshca/test/node"
	"github.com/meshca/meshca/test/readme"
)

const (
	// short is the life of SVIDs while rotations are counted, long while things are taken down: a CA that is away for a
	// while is not to be the end of any.
	short, long = 20 * time.Second, 10 * time.Minute
	rate        = 20
)

// TestInstalled is the life of an installation, on one node: each step finds what the one before it left.
func TestInstalled(t *testing.T) {
	n := node.Start(t)
	s := must(helm.Prepare(t.Context(), n, func(what string) { t.Log(what) }))(t)
	before := inventory(t, s)
	for _, step := range []struct {
		name string
		do   func(*testing.T, *helm.Site)
	}{
		{"five minutes on a cluster", install},
		{"traffic through six rotations", rotations},
		{"a service account is deleted", accountDeleted},
		{"parts are taken down under traffic", takenDown},
		{"rotations go on", rotationsGoOn},
		{"the start-up taint", startupTaint},
		{"the shared socket", sharedSocket},
		{"trust is published", published},
		{"uninstall leaves nothing", func(t *testing.T, s *helm.Site) { uninstall(t, s, before) }},
		{"the root is in Vault, and is replaced under traffic", inVault},
	} {
		if !t.Run(step.name, func(t *testing.T) { step.do(t, s) }) {
			return
		}
	}
}

// install does what the README tells, word for word: Helm, one kubectl apply, and a pod whose Envoy answers over mTLS.
func install(t *testing.T, s *helm.Site) {
	snippets := must(readme.Parse(string(must(os.ReadFile(filepath.Join(s.Root, "README.md")))(t)), readme.OnACluster))(t)
	if len(snippets) < 3 {
		t.Fatalf("the README has %d blocks for a cluster", len(snippets))
	}
	for _, snippet := range snippets {
		began := time.Now()
		ctx, cancel := context.WithTimeout(t.Context(), 5*time.Minute)
		defer cancel()
		cmd := exec.CommandContext(ctx, "bash", "-euo", "pipefail", "-c", snippet.Commands)
		cmd.Dir, cmd.Env = s.Root, s.Environ()
		out, err := cmd.CombinedOutput()
		if missing := readme.Missing(string(out), snippet.Shows); err != nil || missing != "" {
			t.Fatalf("README.md:%d: %v, missing %q\n%s\nprinted:\n%s", snippet.Line, err, missing, snippet.Commands, out)
		}
		t.Logf("README.md:%d took %v", snippet.Line, time.Since(began).Round(100*time.Millisecond))
	}
	for what, want := range map[string]string{
		must(s.Certctl(t.Context(), "status"))(t):                       "cluster.local",
		must(s.Certctl(t.Context(), "check"))(t):                        "checks: 0 errors",
		must(s.Certctl(t.Context(), "svid", "list"))(t):                 "spiffe://cluster.local/ns/demo/sa/greeter",
		must(s.AgentCertctl(t.Context(), "--agent", "svid", "list"))(t): "demo/visitor-",
		must(s.AgentCertctl(t.Context(), "--agent", "check"))(t):        "csi.meshca.io is registered with the kubelet, 2 volumes",
	} {
		if !strings.Contains(what, want) {
			t.Errorf("certctl does not say %q:\n%s", want, what)
		}
	}
}

// strict is the example with a handshake for each request, whole each time, and with the client's serial in the answer:
// a kept connection or a resumed session would hide what is wrong with a rotation. There is a second client, the leaver.
func strict(t *testing.T, s *helm.Site) string {
	t.Helper()
	text := must(s.Example())(t)
	for old, with := range map[string]string{
		"require_client_certificate: true\n": `require_client_certificate: true
                  disable_stateless_session_resumption: true
                  disable_stateful_session_resumption: true
`,
		"I am %DOWNSTREAM_LOCAL_URI_SAN%.": "I am %DOWNSTREAM_LOCAL_URI_SAN%. %DOWNSTREAM_PEER_SERIAL%",
		`- {san_type: URI, matcher: {exact: "spiffe://cluster.local/ns/demo/sa/visitor"}}`: `- {san_type: URI, matcher: {exact: "spiffe://cluster.local/ns/demo/sa/visitor"}}
                          - {san_type: URI, matcher: {exact: "spiffe://cluster.local/ns/demo/sa/leaver"}}`,
		"          type: STRICT_DNS\n          connect_timeout: 5s\n": `          type: STRICT_DNS
          connect_timeout: 20s # a busy machine
          typed_extension_protocol_options:
            envoy.extensions.upstreams.http.v3.HttpProtocolOptions:
              "@type": type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions
              explicit_http_config: {http_protocol_options: {}}
              common_http_protocol_options: {max_requests_per_connection: 1}
`,
		"transport_sockets.tls.v3.UpstreamTlsContext\n": `transport_sockets.tls.v3.UpstreamTlsContext
              max_session_keys: 0
`,
		"route: {cluster: greeter}": "route: {cluster: greeter, timeout: 20s}",
	} {
		if strings.Count(text, old) != 1 {
			t.Fatalf("the example has %q %d times", old, strings.Count(text, old))
		}
		text = strings.Replace(text, old, with, 1)
	}
	at := strings.Index(text, "# The client of the example")
	if at < 0 {
		t.Fatal("the example has no client")
	}
	return text + "---\n" + strings.ReplaceAll(text[at:], "visitor", "leaver")
}

func rotations(t *testing.T, s *helm.Site) {
	ctx := t.Context()
	check(t, s.Live(ctx, short))
	check(t, s.Apply(ctx, strict(t, s)))
	_, err := s.Kubectl(ctx, "--namespace", "demo", "rollout", "restart", "deployment/greeter", "deployment/visitor") // their configuration has changed
	check(t, err)
	check(t, s.ApplyExample(ctx, strict(t, s)))
	check(t, s.Send(ctx, "traffic", "visitor", rate))
	check(t, s.Send(ctx, "leaving", "leaver", rate))
	for _, pod := range []string{"traffic", "leaving"} {
		check(t, s.PodReady(ctx, "demo", pod))
	}
	greeted := must(s.Issued(ctx, "greeter"))(t)
	await(t, s, 5*time.Minute, "six rotations of the client's certificate", func(ctx context.Context) error {
		return between(must(s.Sent(ctx, "traffic"))(t).Answers, 7)
	})
	await(t, s, time.Minute, "six of the server's", func(ctx context.Context) error {
		return between(must(s.Issued(ctx, "greeter"))(t)-greeted, 6)
	})
	for _, pod := range []string{"traffic", "leaving"} {
		unbroken(t, s, pod)
	}
}

// between says how far something has come.
func between(is, want int) error {
	if is < want {
		return fmt.Errorf("%d of %d", is, want)
	}
	return nil
}

// unbroken fails where a request failed.
func unbroken(t *testing.T, s *helm.Site, pod string) helm.Tally {
	t.Helper()
	sent := must(s.Sent(t.Context(), pod))(t)
	if sent.Failed > 0 || sent.OK == 0 {
		t.Errorf("%s: %d requests failed and %d did not; the last: %s", pod, sent.Failed, sent.OK, sent.Last)
	}
	t.Logf("%s: ok=%d failed=%d over %d certificates", pod, sent.OK, sent.Failed, sent.Answers)
	return sent
}

// accountDeleted takes the leaver's service account away: the agent drops its identity, its traffic ends, and nobody else's
// does. lives is how long a proxy may go on with what it was given before. Nothing is renewed in the first quarter of it: that
// the agent drops the identity long before can only be the CA's word.
func accountDeleted(t *testing.T, s *helm.Site) {
	const lives, bound = 4 * time.Minute, 15 * time.Second
	ctx := t.Context()
	check(t, s.Live(ctx, lives))
	leaver := func(ctx context.Context, says string) error {
		list := must(s.AgentCertctl(ctx, "--agent", "svid", "list"))(t)
		for line := range strings.Lines(list) {
			if strings.Contains(line, "demo/leaver-") && regexp.MustCompile(says).MatchString(line) {
				return nil
			}
		}
		return fmt.Errorf("it holds\n%s", list)
	}
	await(t, s, 3*time.Minute, "an SVID of the leaver's that was signed just now", func(ctx context.Context) error { return leaver(ctx, " (4m|3m[345][0-9]s) left of 4m ") })
	check(t, s.Clientset.CoreV1().ServiceAccounts("demo").Delete(ctx, "leaver", metav1.DeleteOptions{}))
	began := time.Now()
	await(t, s, lives/4, "the agent without the identity", func(ctx context.Context) error { return leaver(ctx, "refused .*SERVICE_ACCOUNT_GONE") })
	dropped := time.Since(began)
	figures.For(t).Add("the agent was seen without the identity of a deleted service account after %v", dropped.Round(100*time.Millisecond))
	if dropped > bound {
		t.Errorf("the agent held an identity for %v after its service account was deleted, more than %v", dropped, bound)
	}
	ends := must(s.Kubectl(ctx, "--namespace", helm.Namespace, "logs", "meshca-0"))(t)
	if !slices.ContainsFunc(strings.Split(ends, "\n"), func(line string) bool {
		return strings.Contains(line, `"msg":"end"`) && strings.Contains(line, "/sa/leaver") && strings.Contains(line, "SERVICE_ACCOUNT_GONE")
	}) {
		t.Error("the audit log does not say that the CA ended the identity")
	}
	var ended time.Duration
	await(t, s, lives+2*time.Minute, "the end of the traffic of a service account that was deleted", func(ctx context.Context) error {
		sent := must(s.Sent(ctx, "leaving"))(t)
		if sent.Failed == 0 {
			return fmt.Errorf("%d requests were answered", sent.OK)
		}
		ended = time.Since(began)
		return nil
	})
	t.Logf("the first request failed %v after the service account was deleted", ended.Round(100*time.Millisecond))
	at := must(s.Sent(ctx, "leaving"))(t)
	await(t, s, time.Minute, "further requests", func(ctx context.Context) error {
		return between(int(must(s.Sent(ctx, "leaving"))(t).Failed-at.Failed), 20)
	})
	if now := must(s.Sent(ctx, "leaving"))(t); now.Answers > at.Answers {
		t.Errorf("the identity of an account that is gone was renewed: %d certificates, then %d", at.Answers, now.Answers)
	}
	unbroken(t, s, "traffic")
	_, err := s.Kubectl(ctx, "--namespace", "demo", "delete", "pod/leaving", "deployment/leaver", "service/leaver", "configmap/leaver")
	check(t, err)
}

// takenDown takes each part down and up again. SVIDs live long enough for each to be away for a while.
func takenDown(t *testing.T, s *helm.Site) {
	ctx := t.Context()
	check(t, s.Live(ctx, long))
	await(t, s, 3*time.Minute, "SVIDs that live longer", func(ctx context.Context) error {
		list := must(s.AgentCertctl(ctx, "--agent", "svid", "list"))(t)
		if strings.Count(list, " left of 10m ") < 2 {
			return fmt.Errorf("the agent holds\n%s", list)
		}
		return nil
	})
	restart := func(what string) {
		t.Helper()
		_, err := s.Kubectl(ctx, "--namespace", helm.Namespace, "rollout", "restart", what)
		check(t, err)
		check(t, s.RolledOut(ctx))
	}
	program := func(name string) {
		t.Helper()
		check(t, s.StopProgram(ctx, name))
		time.Sleep(3 * time.Second) // under traffic
		check(t, s.StartProgram(ctx, name))
	}
	for _, down := range []struct {
		what string
		do   func()
	}{
		{"the agents' DaemonSet is rolled", func() { restart("daemonset/meshca-agent") }},
		{"the CA is restarted", func() { restart("statefulset/meshca") }},
		{"the CA's pod is killed", func() {
			_, err := s.Kubectl(ctx, "--namespace", helm.Namespace, "delete", "pod", "meshca-0", "--grace-period=0", "--force")
			check(t, err)
			await(t, s, time.Minute, "another pod of the CA", func(ctx context.Context) error {
				_, err := s.Clientset.CoreV1().Pods(helm.Namespace).Get(ctx, "meshca-0", metav1.GetOptions{})
				return err
			})
			check(t, s.RolledOut(ctx))
		}},
		{"the node's containerd is restarted", func() { program("containerd") }},
		{"the node's kubelet is restarted", func() { program("kubelet") }},
	} {
		began, sent := time.Now(), must(s.Sent(ctx, "traffic"))(t)
		down.do()
		// It must be seen to go on: requests, and a pod that starts now.
		starts(t, s)
		await(t, s, time.Minute, "traffic after "+down.what, func(ctx context.Context) error {
			return between(int(must(s.Sent(ctx, "traffic"))(t).OK-sent.OK), rate)
		})
		t.Logf("%s: %v until a new pod has its identity", down.what, time.Since(began).Round(100*time.Millisecond))
		if unbroken(t, s, "traffic"); t.Failed() {
			return
		}
	}
}

// starts has a pod start that needs an identity before its container runs.
func starts(t *testing.T, s *helm.Site) {
	t.Helper()
	const pod = `
apiVersion: v1
kind: Pod
metadata: {name: late, namespace: demo}
spec:
  serviceAccountName: visitor
  automountServiceAccountToken: false
  terminationGracePeriodSeconds: 1
  securityContext: {runAsNonRoot: true, runAsUser: 65532, seccompProfile: {type: RuntimeDefault}}
  containers:
    - name: c
      image: localhost/inpod:test
      imagePullPolicy: Never
      command: [/inpod, pause]
      securityContext: {allowPrivilegeEscalation: false, capabilities: {drop: [ALL]}}
      volumeMounts: [{name: identity, mountPath: /id, readOnly: true}]
  volumes: [{name: identity, csi: {driver: csi.meshca.io, readOnly: true}}]
`
	ctx, cancel := context.WithTimeout(t.Context(), 3*time.Minute)
	defer cancel()
	check(t, s.Apply(ctx, pod))
	check(t, s.PodReady(ctx, "demo", "late"))
	check(t, s.Delete(ctx, pod))
}

// rotationsGoOn: after all that, proxies still get what is new.
func rotationsGoOn(t *testing.T, s *helm.Site) {
	ctx := t.Context()
	check(t, s.Live(ctx, short))
	seen := must(s.Sent(ctx, "traffic"))(t).Answers
	await(t, s, 3*time.Minute, "two rotations", func(ctx context.Context) error {
		return between(must(s.Sent(ctx, "traffic"))(t).Answers-seen, 2)
	})
	unbroken(t, s, "traffic")
	for _, pod := range must(s.Clientset.CoreV1().Pods("demo").List(ctx, metav1.ListOptions{}))(t).Items {
		for _, c := range pod.Status.ContainerStatuses {
			if c.RestartCount > 0 {
				t.Errorf("%s did not live through it: %d restarts", pod.Name, c.RestartCount)
			}
		}
	}
}

// startupTaint: a node that comes with the taint loses it when its agent is ready, also where the CA has no other node to
// run on.
func startupTaint(t *testing.T, s *helm.Site) {
	ctx := t.Context()
	check(t, s.Live(ctx, long))
	check(t, s.Upgrade(ctx, "--set", "agent.startupTaint.enabled=true"))
	_, err := s.Kubectl(ctx, "taint", "node", node.Name, "meshca.io/agent-not-ready=:NoSchedule")
	check(t, err)
	_, err = s.Kubectl(ctx, "--namespace", helm.Namespace, "delete", "pod", "meshca-0")
	check(t, err)
	_, err = s.Kubectl(ctx, "--namespace", helm.Namespace, "rollout", "restart", "daemonset/meshca-agent")
	check(t, err)
	check(t, s.RolledOut(ctx))
	await(t, s, time.Minute, "the node without the taint", func(ctx context.Context) error {
		if taints := must(s.Clientset.CoreV1().Nodes().Get(ctx, node.Name, metav1.GetOptions{}))(t).Spec.Taints; len(taints) > 0 {
			return fmt.Errorf("it has %+v", taints)
		}
		return nil
	})
	unbroken(t, s, "traffic")
}

// published has the CA publish what is no object of the chart's: uninstalling is to find it.
func published(t *testing.T, s *helm.Site) {
	ctx := t.Context()
	check(t, s.Upgrade(ctx, "--set", "ca.publish.clusterTrustBundle.name=bundle,ca.publish.istio.name=istio-ca-root-cert"))
	await(t, s, 2*time.Minute, "the trust bundle in the cluster", func(ctx context.Context) error {
		for _, namespace := range []string{"default", "demo"} {
			if _, err := s.Clientset.CoreV1().ConfigMaps(namespace).Get(ctx, "istio-ca-root-cert", metav1.GetOptions{}); err != nil {
				return err
			}
		}
		_, err := s.Kubectl(ctx, "get", "clustertrustbundle", "meshca.io:workload:bundle")
		return err
	})
}

// uninstall takes the example away, then the chart. The cluster then has the objects that it had, and the node no trace.
func uninstall(t *testing.T, s *helm.Site, before []string) {
	ctx := t.Context()
	if traces := hostTraces(t, s); len(traces) < 4 {
		t.Errorf("with meshca on it the node has no more traces than %q: the search finds nothing", traces)
	}
	_, err := s.Kubectl(ctx, "delete", "namespace", "demo", "--timeout=3m")
	check(t, err)
	check(t, s.Uninstall(ctx))
	await(t, s, time.Minute, "the cluster as it was before", func(context.Context) error {
		for _, object := range inventory(t, s) {
			if !slices.Contains(before, object) {
				return fmt.Errorf("left: %s", object)
			}
		}
		return nil
	})
	await(t, s, time.Minute, "the node as it was before", func(context.Context) error { // the kubelet takes its pods' directories away
		if traces := hostTraces(t, s); len(traces) > 0 {
			return fmt.Errorf("left: %q", traces)
		}
		return nil
	})
	csi := must(s.Clientset.StorageV1().CSINodes().Get(ctx, node.Name, metav1.GetOptions{}))(t)
	if len(csi.Spec.Drivers) > 0 {
		t.Errorf("the node still has drivers: %+v", csi.Spec.Drivers)
	}
	volume := must(s.Clientset.CoreV1().PersistentVolumes().Get(ctx, "ca", metav1.GetOptions{}))(t)
	if volume.Status.Phase != corev1.VolumeReleased {
		t.Errorf("the CA's volume is %s: its claim was to go with the chart", volume.Status.Phase)
	}
}

// await asks until condition is met.
func await(t *testing.T, s *helm.Site, limit time.Duration, what string, condition func(context.Context) error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), limit)
	defer cancel()
	if err := s.Await(ctx, what, func(ctx context.Context) error {
		err := condition(ctx)
		if err != nil {
			time.Sleep(500 * time.Millisecond)
		}
		return err
	}); err != nil {
		t.Fatal(err)
	}
}

func check(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
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
