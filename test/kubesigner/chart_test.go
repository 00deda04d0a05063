package kubesigner_test

import (
	"bytes"
	"fmt"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	authorizationv1 "k8s.io/api/authorization/v1"
	batchv1 "k8s.io/api/batch/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/yaml"

	"github.com/meshca/meshca/test/chart"
	"github.com/meshca/meshca/test/kube"
	"github.com/meshca/meshca/test/parts"
)

// The chart's own accounts: of the CA, and of what runs when the chart is uninstalled.
const (
	chartAccount     = "system:serviceaccount:meshca:meshca"
	unpublishAccount = "system:serviceaccount:meshca:meshca-unpublish"
)

// Values that each give the CA something to do in the cluster, and a right that comes with each.
var chartValues = map[string]authorizationv1.ResourceAttributes{
	"ca.signers.podCertificateRequests=true":     {Group: "certificates.k8s.io", Verb: "patch", Resource: "podcertificaterequests", Subresource: "status", Namespace: "shop", Name: "r"},
	"ca.signers.certificateSigningRequests=true": {Group: "certificates.k8s.io", Verb: "approve", Resource: "signers", Name: signerName},
	"ca.publish.clusterTrustBundle.name=bundle":  {Group: "certificates.k8s.io", Verb: "attest", Resource: "signers", Name: signerName},
	"ca.publish.linkerd.namespace=linkerd":       {Verb: "patch", Resource: "configmaps", Namespace: "linkerd", Name: "linkerd-identity-trust-roots"},
	"ca.publish.istio.name=istio-ca-root-cert":   {Verb: "patch", Resource: "configmaps", Namespace: "shop", Name: "istio-ca-root-cert"},
}

// rendered is the chart with all of these values but one.
func rendered(t *testing.T, without string, args ...string) string {
	t.Helper()
	args = append(args, "--set", "trustDomain=mesh.test,ca.attestation=jwks")
	for value := range chartValues {
		if value != without {
			args = append(args, "--set", value)
		}
	}
	return must(chart.Render(t.Context(), args...))(t)
}

func kubectl(t *testing.T, c *kube.Cluster, input string, args ...string) string {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), parts.Path(t, "kubectl"), append([]string{"--kubeconfig", c.Kubeconfig}, args...)...)
	cmd.Env, cmd.Stdin = []string{"HOME=" + t.TempDir()}, strings.NewReader(input)
	var out, problems bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &problems
	if err := cmd.Run(); err != nil {
		t.Fatalf("kubectl %v: %v\n%s", args, err, problems.String())
	}
	return out.String()
}

// TestTheChartsRights has the CA answer and publish as the chart's own account, with the rights that the chart gives it and no
// others; then the chart is uninstalled, and nothing is left.
func TestTheChartsRights(t *testing.T) {
	c := must(launch(t.Context(), t.TempDir()))(t)
	t.Cleanup(c.Close)
	kubectl(t, c, rendered(t, "", "--no-hooks"), "apply", "-f", "-")
	t.Run("used", func(t *testing.T) { chartUsed(t, c) })
	t.Run("without each value", func(t *testing.T) { chartWithout(t, c) })
	t.Run("uninstalled", func(t *testing.T) { chartUninstalled(t, c) })
}

func chartUsed(t *testing.T, c *kube.Cluster) {
	h := newHouse(t, c, directForAll, chartAccount)
	s, p := h.signer("ca-0"), h.publisher(free, nil)
	if got := h.answered(h.podRequest(nil)).Status.Conditions[0]; got.Type != "Issued" {
		t.Errorf("a kubelet's request: %+v", got)
	}
	if got := h.signed(h.signingRequest(h.podToken(), nil)); len(got.Status.Certificate) == 0 {
		t.Errorf("a pod's request: %+v", got.Status)
	}
	eventually(t, h.everywhere)
	eventually(t, func() error {
		for _, d := range s.Status() {
			if d.State != "serving" {
				return fmt.Errorf("%+v", d)
			}
		}
		for _, x := range p.Status() {
			if x.Fault != "" || x.Since.IsZero() {
				return fmt.Errorf("%+v", x)
			}
		}
		return nil
	})
}

func chartWithout(t *testing.T, c *kube.Cluster) {
	for without := range chartValues {
		kubectl(t, c, rendered(t, without, "--no-hooks"), "apply", "-f", "-")
		if strings.Contains(without, "linkerd") { // its Role is another object, which Helm deletes and kubectl apply does not
			kubectl(t, c, "", "--namespace", "linkerd", "delete", "rolebinding", "meshca-trust")
		}
		for value, right := range chartValues {
			eventually(t, func() error { // what was changed comes to the authorizer by a watch
				if may := mayDo(t, c, chartAccount, right); may != (value != without) {
					return fmt.Errorf("without %s: %+v is allowed: %v", without, right, may)
				}
				return nil
			})
		}
		kubectl(t, c, rendered(t, "", "--no-hooks"), "apply", "-f", "-")
	}
}

func mayDo(t *testing.T, c *kube.Cluster, user string, right authorizationv1.ResourceAttributes) bool {
	t.Helper()
	ask := &authorizationv1.SubjectAccessReview{Spec: authorizationv1.SubjectAccessReviewSpec{User: user, ResourceAttributes: &right}}
	return must(c.Clientset.AuthorizationV1().SubjectAccessReviews().Create(t.Context(), ask, metav1.CreateOptions{}))(t).Status.Allowed
}

// chartUninstalled does what Helm does: it deletes the chart's objects, makes the hook's, runs the Job's command, here with the
// rights of the Job's account, and deletes them too.
func chartUninstalled(t *testing.T, c *kube.Cluster) {
	const ours = "meshca.io/published-for=mesh.test"
	published := func() []string {
		return strings.Fields(kubectl(t, c, "", "get", "clustertrustbundles,configmaps", "--all-namespaces", "-l", ours, "-o", `jsonpath={range .items[*]}{.kind}/{.metadata.namespace}/{.metadata.name}{"\n"}{end}`))
	}
	if all := strings.Join(published(), " "); strings.Count(all, "/istio-ca-root-cert") < 5 || !strings.Contains(all, "ClusterTrustBundle//meshca.io:workload:bundle") ||
		!strings.Contains(all, "ConfigMap/linkerd/linkerd-identity-trust-roots") || !strings.Contains(all, "ConfigMap/meshca/meshca-trust") {
		t.Fatalf("by its label there is %q", all)
	}
	for namespace, domain := range map[string]string{"theirs": "", "another": "other.test"} {
		must(c.CreateNamespace(t.Context(), namespace))(t)
		m := &corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Name: "istio-ca-root-cert", Annotations: map[string]string{"meshca.io/trust-domain": domain}}}
		must(c.Clientset.CoreV1().ConfigMaps(namespace).Create(t.Context(), m, metav1.CreateOptions{}))(t)
	}
	kubectl(t, c, rendered(t, "", "--no-hooks"), "delete", "--wait=false", "-f", "-")

	var hooks []string
	var job batchv1.Job
	for _, doc := range strings.Split(rendered(t, ""), "\n---\n") {
		if !strings.Contains(doc, "helm.sh/hook: post-delete") {
			continue
		}
		if !strings.Contains(doc, "helm.sh/hook-delete-policy: before-hook-creation,hook-succeeded") {
			t.Errorf("it does not go when it has done its work:\n%s", doc)
		}
		if strings.Contains(doc, "kind: Job") {
			if err := yaml.UnmarshalStrict([]byte(doc), &job); err != nil {
				t.Fatal(err)
			}
		}
		hooks = append(hooks, doc)
	}
	kubectl(t, c, strings.Join(hooks, "\n---\n"), "apply", "-f", "-")
	if account := job.Spec.Template.Spec.ServiceAccountName; "system:serviceaccount:meshca:"+account != unpublishAccount || len(hooks) != 4 {
		t.Fatalf("%d objects, and the Job runs as %s", len(hooks), account)
	}
	for _, right := range []authorizationv1.ResourceAttributes{
		{Verb: "delete", Resource: "configmaps", Namespace: "meshca", Name: "other"}, {Verb: "patch", Resource: "configmaps", Namespace: "shop", Name: "istio-ca-root-cert"},
		{Verb: "list", Resource: "configmaps"}, {Group: "certificates.k8s.io", Verb: "delete", Resource: "clustertrustbundles", Name: "other"}, {Verb: "get", Resource: "secrets"},
	} {
		if mayDo(t, c, unpublishAccount, right) {
			t.Errorf("what uninstalls may %+v", right)
		}
	}
	bin := filepath.Join(t.TempDir(), "meshca")
	build := exec.CommandContext(t.Context(), "go", "build", "-o", bin, "./cmd/meshca")
	build.Dir = must(parts.Root())(t)
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	args := append(job.Spec.Template.Spec.Containers[0].Args, "--kubeconfig="+must(c.KubeconfigFor(unpublishAccount))(t))
	out, err := exec.CommandContext(t.Context(), bin, args...).CombinedOutput()
	if err != nil || !strings.Contains(string(out), "deleted clustertrustbundles meshca.io:workload:bundle\n") {
		t.Errorf("%v\n%s", err, out)
	}
	if left := published(); len(left) > 0 {
		t.Errorf("left: %q", left)
	}
	for _, namespace := range []string{"theirs", "another"} {
		if _, err := c.Clientset.CoreV1().ConfigMaps(namespace).Get(t.Context(), "istio-ca-root-cert", metav1.GetOptions{}); err != nil {
			t.Errorf("what is not ours: %v", err)
		}
	}
	if _, err := c.Clientset.CertificatesV1beta1().ClusterTrustBundles().Get(t.Context(), "meshca.io:workload:bundle", metav1.GetOptions{}); !apierrors.IsNotFound(err) {
		t.Errorf("the ClusterTrustBundle: %v", err)
	}
	kubectl(t, c, strings.Join(hooks, "\n---\n"), "delete", "--wait=false", "-f", "-")
	kinds := "clusterroles,clusterrolebindings,roles,rolebindings,configmaps,serviceaccounts,services,statefulsets,daemonsets"
	if left := kubectl(t, c, "", "get", kinds, "--all-namespaces", "-l", "app.kubernetes.io/name=meshca", "-o", "name"); left != "" {
		t.Errorf("left in the cluster: %s", left)
	}
}
