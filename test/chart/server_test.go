package chart_test

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"os/exec"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	appsv1 "k8s.io/api/apps/v1"
	authorizationv1 "k8s.io/api/authorization/v1"
	corev1 "k8s.io/api/core/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"

	"github.com/meshca/meshca/agent/taint"
	"github.com/meshca/meshca/test/chart"
	"github.com/meshca/meshca/test/kube"
	"github.com/meshca/meshca/test/parts"
)

// TestOnAnAPIServer applies the chart with everything that it can have to a real API server, which reads it strictly.
func TestOnAnAPIServer(t *testing.T) {
	c := kube.Start(t)
	apply(t, c, read(t, chart.Manifests))
	apply(t, c, must(chart.Render(t.Context(), "--no-hooks", "--set", "agent.startupTaint.enabled=true,ca.policy.rules[0].name=all",
		"--api-versions", "security.openshift.io/v1", "--set-json", `agent.networkPolicy.metricsFrom=[{"namespaceSelector": {}}]`,
		"--set-json", `ca.networkPolicy.metricsFrom=[{"namespaceSelector": {}}]`, "--set", "ca.upstream.vault.address=https://v",
		"--set", "ca.signers.podCertificateRequests=true,ca.signers.certificateSigningRequests=true,ca.publish.clusterTrustBundle.name=b,ca.publish.istio.name=i"))(t))
	for name, test := range map[string]func(*testing.T, *kube.Cluster){
		"rights":             rights,
		"Pod Security":       podSecurity,
		"the trust bundle":   trustBundle,
		"the start-up taint": startupTaint,
	} {
		t.Run(name, func(t *testing.T) { test(t, c) })
	}
	t.Run("deleted", func(t *testing.T) { uninstalled(t, c) })
}

func apply(t *testing.T, c *kube.Cluster, manifest string) {
	t.Helper()
	kubectl(t, c, manifest, "apply", "-f", "-")
}

func kubectl(t *testing.T, c *kube.Cluster, input string, args ...string) string {
	t.Helper()
	cmd := exec.Command(parts.Path(t, "kubectl"), append([]string{"--kubeconfig", c.Kubeconfig}, args...)...)
	cmd.Env = []string{"HOME=" + t.TempDir()}
	cmd.Stdin = strings.NewReader(input)
	var out, problems bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &problems
	if err := cmd.Run(); err != nil {
		t.Fatalf("kubectl %v: %v\n%s", args, err, problems.String())
	}
	return out.String()
}

const (
	caAccount    = "system:serviceaccount:meshca:meshca"
	agentAccount = "system:serviceaccount:meshca:meshca-agent"
)

// rights asks the API server what the accounts may do. That of the CA is what it needs and no more: nothing with secrets, no
// tokens, nothing that changes the cluster but the one ConfigMap.
func rights(t *testing.T, c *kube.Cluster) {
	type right struct{ verb, group, resource, sub, namespace, name string }
	for user, may := range map[string]map[right]bool{
		caAccount: {
			{"create", "authentication.k8s.io", "tokenreviews", "", "", ""}: true,
			{"get", "", "pods", "", "shop", ""}:                             true, {"list", "", "pods", "", "", ""}: true, {"watch", "", "nodes", "", "", ""}: true,
			{"get", "", "serviceaccounts", "", "shop", ""}: true, {"get", "", "namespaces", "", "", ""}: true,
			{"patch", "", "configmaps", "", "meshca", "meshca-trust"}: true,
			{"patch", "", "configmaps", "", "meshca", "meshca"}:       false, {"patch", "", "configmaps", "", "shop", "meshca-trust"}: false,
			{"create", "", "serviceaccounts", "token", "shop", ""}: false, {"get", "", "secrets", "", "meshca", ""}: false,
			{"patch", "", "nodes", "", "", "n"}: false, {"create", "", "pods", "exec", "shop", ""}: false, {"update", "", "pods", "", "shop", ""}: false,
		},
		agentAccount: {
			{"get", "", "nodes", "", "", "n"}: true, {"patch", "", "nodes", "", "", "n"}: true, // for the taint, which is on here
			{"get", "", "pods", "", "shop", ""}: false, {"get", "", "secrets", "", "meshca", ""}: false, {"update", "", "nodes", "", "", "n"}: false,
			{"patch", "", "nodes", "status", "", "n"}: false, {"create", "authentication.k8s.io", "tokenreviews", "", "", ""}: false,
			{"patch", "", "configmaps", "", "meshca", "meshca-trust"}: false, {"create", "", "serviceaccounts", "token", "meshca", ""}: false,
		},
	} {
		for r, want := range may {
			answer := must(c.Clientset.AuthorizationV1().SubjectAccessReviews().Create(t.Context(), &authorizationv1.SubjectAccessReview{
				Spec: authorizationv1.SubjectAccessReviewSpec{User: user, Groups: []string{"system:serviceaccounts", "system:authenticated"}, ResourceAttributes: &authorizationv1.ResourceAttributes{
					Verb: r.verb, Group: r.group, Resource: r.resource, Subresource: r.sub, Namespace: r.namespace, Name: r.name,
				}},
			}, metav1.CreateOptions{}))(t)
			if answer.Status.Allowed != want {
				t.Errorf("%s, %+v: allowed %v, want %v", user, r, answer.Status.Allowed, want)
			}
		}
	}
}

// TestEveryRightHasAReason: each rule of RBAC in the chart stands below a comment, names no wildcard, and gives the agent
// nothing unless the taint is asked for.
func TestEveryRightHasAReason(t *testing.T) {
	var rules int
	for _, file := range []string{"ca-rights.yaml", "startup-taint.yaml", "unpublish.yaml"} {
		lines := strings.Split(read(t, chart.Dir+"/templates/"+file), "\n")
		for i, line := range lines {
			if !strings.HasPrefix(line, "  - apiGroups:") && !strings.HasPrefix(line, "  - nonResourceURLs:") {
				continue
			}
			rules++
			if !strings.HasPrefix(strings.TrimSpace(lines[i-1]), "#") {
				t.Errorf("%s:%d: a right without its reason above it", file, i+1)
			}
		}
	}
	if rules < 5 {
		t.Errorf("only %d rules were found", rules)
	}
	rendered := read(t, chart.Manifests)
	for _, roles := range []map[string]rbacv1.ClusterRole{objects[rbacv1.ClusterRole](t, rendered, "ClusterRole"), objects[rbacv1.ClusterRole](t, rendered, "Role")} {
		for name, role := range roles {
			for _, rule := range role.Rules {
				if slices.Contains(append(append(rule.Verbs, rule.Resources...), rule.APIGroups...), "*") || slices.Contains(rule.Resources, "secrets") {
					t.Errorf("%s may too much: %+v", name, rule)
				}
			}
		}
	}
	for name, binding := range objects[rbacv1.ClusterRoleBinding](t, rendered, "ClusterRoleBinding") {
		if binding.Subjects[0].Name != "meshca" {
			t.Errorf("by default %s gives rights to %s", name, binding.Subjects[0].Name)
		}
	}
}

// podSecurity has the API server judge the pods as a namespace of the level "restricted" would. The agent's exceptions are
// those that stand at its container, no others.
func podSecurity(t *testing.T, c *kube.Cluster) {
	ctx := t.Context()
	must(c.Clientset.CoreV1().Namespaces().Create(ctx, &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{
		Name: "strict", Labels: map[string]string{"pod-security.kubernetes.io/enforce": "restricted"},
	}}, metav1.CreateOptions{}))(t)
	judge := func(template corev1.PodTemplateSpec) error {
		pod := &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Name: "p"}, Spec: template.Spec}
		for i := range pod.Spec.Volumes { // which the API server wants to be claims; Pod Security does not look
			if pod.Spec.Volumes[i].PersistentVolumeClaim != nil {
				pod.Spec.Volumes[i].PersistentVolumeClaim = nil
			}
		}
		_, err := c.Clientset.CoreV1().Pods("strict").Create(ctx, pod, metav1.CreateOptions{DryRun: []string{metav1.DryRunAll}})
		return err
	}
	for name, args := range map[string][]string{
		"disk": nil, "Vault": {"--set", "ca.upstream.vault.address=https://v"}, "OpenShift": {"--api-versions", "security.openshift.io/v1"},
	} {
		set := objects[appsv1.StatefulSet](t, must(chart.Render(ctx, args...))(t), "StatefulSet")["meshca"]
		set.Spec.Template.Spec.Volumes = append(set.Spec.Template.Spec.Volumes, corev1.Volume{Name: "state"})
		if err := judge(set.Spec.Template); err != nil {
			t.Errorf("the CA (%s) is not restricted: %v", name, err)
		}
		if name == "OpenShift" && set.Spec.Template.Spec.SecurityContext.FSGroup != nil || set.Spec.Template.Spec.SecurityContext.RunAsUser != nil {
			t.Errorf("the CA (%s) chooses its users itself", name)
		}
	}
	err := judge(objects[appsv1.DaemonSet](t, read(t, chart.Manifests), "DaemonSet")["meshca-agent"].Spec.Template)
	if err == nil {
		t.Fatal("the agent, which is privileged, is restricted")
	}
	// "violates PodSecurity "restricted:latest": privileged (…), …": what is not implied by privileged.
	_, list, _ := strings.Cut(err.Error(), `restricted:latest": `)
	var violations []string
	for _, v := range regexp.MustCompile(`\([^)]*\)`).Split(list, -1) {
		if v = strings.Trim(v, ", "); v != "" {
			violations = append(violations, v)
		}
	}
	slices.Sort(violations)
	want := []string{"allowPrivilegeEscalation != false", "privileged", "restricted volume types", "runAsNonRoot != true", "runAsUser=0", "seccompProfile", "unrestricted capabilities"}
	if !slices.Equal(violations, want) {
		t.Errorf("the agent's exceptions are %q, want %q", violations, want)
	}
}

// as is a client with the token of a pod's service account.
func as(t *testing.T, c *kube.Cluster, account, pod, node string) *kubernetes.Clientset {
	t.Helper()
	bound := must(c.CreatePod(t.Context(), "meshca", pod, account, node))(t)
	token := must(c.Token(t.Context(), "meshca", account, bound, "", 10*time.Minute))(t)
	conf := must(clientcmd.BuildConfigFromFlags("", c.Kubeconfig))(t)
	conf = rest.AnonymousClientConfig(conf)
	conf.BearerToken, conf.QPS = token, -1
	return must(kubernetes.NewForConfig(conf))(t)
}

// trustBundle writes the ConfigMap with the CA's own rights; nobody else of the chart's may.
func trustBundle(t *testing.T, c *kube.Cluster) {
	body := []byte(`{"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "meshca-trust"}, "data": {"bundle.json": "{}"}}`)
	force := true
	write := func(client *kubernetes.Clientset) error {
		_, err := client.CoreV1().ConfigMaps("meshca").Patch(t.Context(), "meshca-trust", types.ApplyYAMLPatchType, body, metav1.PatchOptions{FieldManager: "meshca-trust", Force: &force})
		return err
	}
	must(c.CreateNode(t.Context(), "trust-node"))(t)
	if err := write(as(t, c, "meshca", "ca", "trust-node")); err != nil {
		t.Errorf("the CA: %v", err)
	}
	if err := write(as(t, c, "meshca-agent", "agent-of-trust", "trust-node")); !apierrors.IsForbidden(err) {
		t.Errorf("an agent: %v", err)
	}
	apply(t, c, read(t, chart.Manifests)) // an upgrade
	if is := must(c.Clientset.CoreV1().ConfigMaps("meshca").Get(t.Context(), "meshca-trust", metav1.GetOptions{}))(t); is.Data["bundle.json"] != "{}" {
		t.Errorf("applying the chart again took the bundle away: %v", is.Data)
	}
}

// raw is the API server as the agent calls it.
type raw struct{ client *kubernetes.Clientset }

func (r raw) Do(ctx context.Context, method, path, contentType string, body []byte) ([]byte, error) {
	return r.client.CoreV1().RESTClient().Verb(method).AbsPath(path).SetHeader("Content-Type", contentType).Body(body).DoRaw(ctx)
}

// startupTaint takes the taint off with the agent's rights, and tries everything else with them.
func startupTaint(t *testing.T, c *kube.Cluster) {
	ctx := t.Context()
	const key = "meshca.io/agent-not-ready"
	other := corev1.Taint{Key: "other", Value: "x", Effect: corev1.TaintEffectNoSchedule}
	for _, name := range []string{"mine", "another"} {
		must(c.Clientset.CoreV1().Nodes().Create(ctx, &corev1.Node{
			ObjectMeta: metav1.ObjectMeta{Name: name, Labels: map[string]string{"zone": "a"}},
			Spec:       corev1.NodeSpec{ProviderID: "p://" + name, Taints: []corev1.Taint{{Key: key, Effect: corev1.TaintEffectNoSchedule}, other}},
		}, metav1.CreateOptions{}))(t)
	}
	client := as(t, c, "meshca-agent", "agent-on-mine", "mine")
	// The API server adds a taint of its own to new nodes.
	kept := must(c.Clientset.CoreV1().Nodes().Get(ctx, "mine", metav1.GetOptions{}))(t).Spec.Taints[1:]
	taints := func(list ...corev1.Taint) string {
		return fmt.Sprintf(`{"spec": {"taints": %s}}`, must(json.Marshal(list))(t))
	}
	try := func(node, patch string) error {
		_, err := client.CoreV1().Nodes().Patch(ctx, node, types.MergePatchType, []byte(patch), metav1.PatchOptions{DryRun: []string{metav1.DryRunAll}})
		return err
	}
	// The policy takes a moment to be in force.
	for end := time.Now().Add(30 * time.Second); try("mine", `{"metadata": {"labels": {"zone": "b"}}}`) == nil && time.Now().Before(end); {
		time.Sleep(200 * time.Millisecond)
	}
	changed := kept[0]
	changed.Value = "y"
	for _, wrong := range []struct{ node, patch, why string }{
		{"another", taints(kept...), "the node that it runs on, and no other"},
		{"mine", taints(), "and no other"},
		{"mine", taints(append([]corev1.Taint{changed}, kept[1:]...)...), "and no other"},
		{"mine", taints(append(kept, corev1.Taint{Key: "new", Effect: corev1.TaintEffectNoExecute})...), "and no other"},
		{"mine", `{"spec": {"unschedulable": true}}`, "the taints of its node, and nothing else"},
		{"mine", `{"metadata": {"labels": {"zone": "b"}}}`, "the taints of its node, and nothing else"},
		{"mine", `{"metadata": {"annotations": {"a": "b"}}}`, "the taints of its node, and nothing else"},
	} {
		if err := try(wrong.node, wrong.patch); err == nil || !strings.Contains(err.Error(), wrong.why) {
			t.Errorf("%s %s: %v", wrong.node, wrong.patch, err)
		}
	}
	if err := client.CoreV1().Nodes().Delete(ctx, "another", metav1.DeleteOptions{}); !apierrors.IsForbidden(err) {
		t.Errorf("deleting a node: %v", err)
	}
	r := must(taint.New(taint.Config{Key: key, API: raw{client}}))(t)
	if removed, err := r.Remove(ctx, "mine"); !removed || err != nil {
		t.Errorf("removed %v, %v", removed, err)
	}
	if is := must(c.Clientset.CoreV1().Nodes().Get(ctx, "mine", metav1.GetOptions{}))(t); !slices.Equal(is.Spec.Taints, kept) {
		t.Errorf("the node has the taints %v", is.Spec.Taints)
	}
}

// uninstalled takes the manifests away again, and finds none of their objects.
func uninstalled(t *testing.T, c *kube.Cluster) {
	rendered := must(chart.Render(t.Context(), "--set", "agent.startupTaint.enabled=true,ca.policy.rules[0].name=all", "--api-versions", "security.openshift.io/v1"))(t)
	kubectl(t, c, rendered, "delete", "--ignore-not-found", "--wait=false", "-f", "-")
	kinds := "clusterroles,clusterrolebindings,csidrivers,validatingadmissionpolicies,validatingadmissionpolicybindings,priorityclasses"
	if left := kubectl(t, c, "", "get", kinds, "-l", "app.kubernetes.io/name=meshca", "-o", "name"); left != "" {
		t.Errorf("left in the cluster: %s", left)
	}
}
