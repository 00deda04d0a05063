package helm_test

import (
	"context"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/meshca/meshca/test/chart"
	"github.com/meshca/meshca/test/helm"
)

// sharedSocket: a pod without a volume is refused at the node's socket until policy opens it, and then has its identity.
func sharedSocket(t *testing.T, s *helm.Site) {
	ctx := t.Context()
	check(t, s.Upgrade(ctx, "--set", "agent.sharedSocket.enabled=true"))
	check(t, s.Apply(ctx, fmt.Sprintf(`
apiVersion: v1
kind: Namespace
metadata: {name: legacy}
---
apiVersion: v1
kind: ServiceAccount
metadata: {name: old, namespace: legacy}
---
apiVersion: v1
kind: Pod
metadata: {name: old, namespace: legacy}
spec:
  serviceAccountName: old
  automountServiceAccountToken: false
  restartPolicy: OnFailure
  securityContext: {runAsNonRoot: true, runAsUser: 65532}
  containers:
    - name: c
      image: %s/meshca:%s
      imagePullPolicy: Never
      command: [certctl, svid, fetch, /run/meshca-agent/agent.sock, --timeout, 30s]
      volumeMounts: [{name: meshca, mountPath: /run/meshca-agent, readOnly: true}]
  volumes: [{name: meshca, hostPath: {path: /run/meshca-agent/shared}}]
`, helm.Registry, must(chart.AppVersion())(t))))
	await(t, s, time.Minute, "the CA's refusal", func(ctx context.Context) error {
		told, err := s.Certctl(ctx, "explain", "pod", "legacy/old")
		if err == nil && !strings.Contains(told, "NODE_VOUCHED_NOT_ALLOWED") {
			err = fmt.Errorf("it says\n%s", told)
		}
		return err
	})
	check(t, s.Upgrade(ctx, "--set", "ca.policy.rules[0].nodeVouched=true"))
	patient, cancel := context.WithTimeout(ctx, 5*time.Minute) // the kubelet brings policy, and starts the pod anew, when it sees fit
	defer cancel()
	check(t, s.PodDone(patient, "legacy", "old"))
	if log := must(s.PodLogs(ctx, "legacy", "old"))(t); !strings.Contains(log, "spiffe://cluster.local/ns/legacy/sa/old") {
		t.Errorf("the pod was served\n%s", log)
	}
	_, err := s.Kubectl(ctx, "delete", "namespace", "legacy")
	check(t, err)
	unbroken(t, s, "traffic")
}
