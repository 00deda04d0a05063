package csi

import (
	"context"
	"fmt"
	"io/fs"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/meshca/meshca/test/helm"
)

// arbitraryUID is one of the range that OpenShift gives a namespace.
const arbitraryUID = 1000690000

// openShift has the cluster treat the installation's namespace as OpenShift does: the API group is served by which the chart
// knows one, and admission does to pods what the SCC "restricted" does. Each container gets the namespace's user, the pod its
// group; whoever asks for another is refused. The agents' account has the SCC "privileged" there, which leaves pods as they come.
var openShift = strings.ReplaceAll(`
apiVersion: apiextensions.k8s.io/v1
kind: CustomResourceDefinition
metadata: {name: securitycontextconstraints.security.openshift.io}
spec:
  group: security.openshift.io
  scope: Cluster
  names: {plural: securitycontextconstraints, singular: securitycontextconstraints, kind: SecurityContextConstraints}
  versions:
    - {name: v1, served: true, storage: true, schema: {openAPIV3Schema: {type: object, x-kubernetes-preserve-unknown-fields: true}}}
---
apiVersion: admissionregistration.k8s.io/v1
kind: MutatingAdmissionPolicy
metadata: {name: restricted}
spec:
  reinvocationPolicy: Never
  matchConstraints: {resourceRules: [{apiGroups: [""], apiVersions: [v1], operations: [CREATE], resources: [pods]}]}
  matchConditions: [{name: not-privileged, expression: object.spec.serviceAccountName != "meshca-agent"}]
  mutations:
    - patchType: ApplyConfiguration
      applyConfiguration:
        expression: >-
          Object{spec: Object.spec{
            securityContext: Object.spec.securityContext{fsGroup: object.spec.?securityContext.?fsGroup.orValue(UID)},
            initContainers: object.spec.?initContainers.orValue([]).map(c, Object.spec.initContainers{name: c.name,
              securityContext: Object.spec.initContainers.securityContext{runAsUser: c.?securityContext.?runAsUser.orValue(UID)}}),
            containers: object.spec.containers.map(c, Object.spec.containers{name: c.name,
              securityContext: Object.spec.containers.securityContext{runAsUser: c.?securityContext.?runAsUser.orValue(UID)}})}}
---
apiVersion: admissionregistration.k8s.io/v1
kind: MutatingAdmissionPolicyBinding
metadata: {name: restricted}
spec: {policyName: restricted, matchResources: {namespaceSelector: {matchLabels: {kubernetes.io/metadata.name: meshca}}}}
---
apiVersion: admissionregistration.k8s.io/v1
kind: ValidatingAdmissionPolicy
metadata: {name: restricted}
spec:
  matchConstraints: {resourceRules: [{apiGroups: [""], apiVersions: [v1], operations: [CREATE], resources: [pods]}]}
  matchConditions: [{name: not-privileged, expression: object.spec.serviceAccountName != "meshca-agent"}]
  validations:
    - expression: >-
        object.spec.securityContext.fsGroup == UID && !has(object.spec.securityContext.runAsUser) &&
        (object.spec.containers + object.spec.?initContainers.orValue([])).all(c, c.securityContext.runAsUser == UID)
      message: fsGroup and runAsUser are the namespace's
---
apiVersion: admissionregistration.k8s.io/v1
kind: ValidatingAdmissionPolicyBinding
metadata: {name: restricted}
spec: {policyName: restricted, validationActions: [Deny], matchResources: {namespaceSelector: {matchLabels: {kubernetes.io/metadata.name: meshca}}}}
`, "UID", fmt.Sprint(arbitraryUID))

// asOpenShift prepares the cluster, and returns when it does so.
func asOpenShift(t *testing.T, s *site) {
	ctx := t.Context()
	must(s.CreateNamespace(ctx, helm.Namespace))(t)
	check(t, s.Apply(ctx, openShift))
	try := func(ctx context.Context, user *int64) (*corev1.Pod, error) {
		pod := podOf(helm.Namespace, "try", "idle")
		pod.Spec.ServiceAccountName = "default"
		pod.Spec.Containers[0].SecurityContext = &corev1.SecurityContext{RunAsUser: user}
		return s.Clientset.CoreV1().Pods(helm.Namespace).Create(ctx, pod, metav1.CreateOptions{DryRun: []string{metav1.DryRunAll}})
	}
	s.eventually(t, "admission as OpenShift's", func(ctx context.Context) error {
		pod, err := try(ctx, nil)
		if err != nil {
			return err
		}
		if user := pod.Spec.Containers[0].SecurityContext.RunAsUser; user == nil || *user != arbitraryUID {
			return fmt.Errorf("a pod comes with the security contexts %+v and %+v", pod.Spec.SecurityContext, pod.Spec.Containers[0].SecurityContext)
		}
		own := int64(65532)
		if _, err := try(ctx, &own); err == nil || !strings.Contains(err.Error(), "are the namespace's") {
			return fmt.Errorf("a pod with a user of its own: %w", err)
		}
		return nil
	})
}

// anyUser: the CA runs as the user that it was given, makes its root and keeps its store as that, and comes up on them again.
func anyUser(t *testing.T, s *site, h *helm.Site) {
	ctx := t.Context()
	_, err := s.Kubectl(ctx, "--namespace", helm.Namespace, "get", "rolebinding", "meshca-agent-privileged")
	check(t, err) // the chart took the cluster for what it plays
	began := must(s.Clientset.CoreV1().Pods(helm.Namespace).Get(ctx, "meshca-0", metav1.GetOptions{}))(t)
	_, err = s.Kubectl(ctx, "--namespace", helm.Namespace, "delete", "pod", "meshca-0")
	check(t, err)
	s.eventually(t, "another pod of the CA", func(ctx context.Context) error {
		pod, err := s.Clientset.CoreV1().Pods(helm.Namespace).Get(ctx, "meshca-0", metav1.GetOptions{})
		if err == nil && pod.UID == began.UID {
			err = fmt.Errorf("it is that of before")
		}
		return err
	})
	check(t, h.RolledOut(ctx))
	if says := must(h.Certctl(ctx, "check"))(t); !strings.Contains(says, "checks: 0 errors") {
		t.Errorf("certctl check says\n%s", says)
	}
	var files []string
	check(t, filepath.WalkDir(s.Path("/var/lib/volumes/ca"), func(path string, entry fs.DirEntry, err error) error {
		if err != nil || !entry.Type().IsRegular() {
			return err
		}
		info, err := entry.Info()
		if err != nil {
			return err
		}
		owner, ok := info.Sys().(*syscall.Stat_t)
		if !ok || owner.Uid != arbitraryUID {
			t.Errorf("%s belongs to %+v", entry.Name(), owner)
		}
		files = append(files, entry.Name()+" "+info.Mode().String())
		return nil
	}))
	if all := strings.Join(files, ", "); !strings.Contains(all, "root.key -rw-------") {
		t.Errorf("on its volume the CA has %s", all)
	}
	web := s.create(t, identified(podOf(namespace, "web", "first", socket)))
	if got := s.said(t, web, "secret", 1)[0]; got.ID != idOf(web) {
		t.Errorf("the CA gives %+v", got)
	}
	s.delete(t, web)
}
