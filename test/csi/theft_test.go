package csi

import (
	"context"
	"encoding/json"
	"errors"
	"net"
	"os"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/meshca/meshca/test/helm"
	"github.com/meshca/meshca/test/node"
)

// otherNode is a Node object with pods bound to it, whose tokens the API server gives. Nothing runs there.
const otherNode = "node2"

// theft: what lies on the node of its agent, the SVID and the token, and the token of a pod there, are shown to the CA from a
// pod that they are not of, together with what pods of another node have. Where it does not fit together it is refused, each time
// with a line in the audit log; where it does, it is worth what it was there, until the agent's pod is replaced.
func theft(t *testing.T, s *site) {
	ctx := t.Context()
	victim := s.create(t, identified(podOf(namespace, "robbed", "watch", socket)))
	s.said(t, victim, "secret", 2)
	must(s.CreateNode(ctx, otherNode))(t)
	elsewhere := podOf(namespace, "elsewhere", "idle")
	agent := podOf(helm.Namespace, "agent-elsewhere", "idle")
	agent.Spec.ServiceAccountName = "meshca-agent"
	for _, pod := range []*corev1.Pod{elsewhere, agent} {
		pod.Spec.NodeName = otherNode
		*pod = *s.create(t, pod)
	}
	check(t, s.Apply(ctx, s.lootOf(t, victim, elsewhere, agent)))

	const id = "spiffe://mesh.test/meshca/agent/main/"
	s.steals(t, []attempt{
		{"an SVID for the agent's token", "granted", "attest-agent issued by nobody"},
		{"an SVID for the other agent's token", "granted", "attest-agent issued by nobody"},
		{"the agent's SVID, with the token of a pod on the other node", "POD_NOT_ON_NODE", "issue POD_NOT_ON_NODE by " + id + "node1 for elsewhere"},
		{"an SVID got by the agent's token, with the token of a pod on the other node", "POD_NOT_ON_NODE", "issue POD_NOT_ON_NODE by " + id + "node1 for elsewhere"},
		{"the other agent's SVID, with the token of a pod beside the first", "POD_NOT_ON_NODE", "issue POD_NOT_ON_NODE by " + id + "node2 for robbed"},
		{"the agent's SVID, with its own token", "TOKEN_AUDIENCE", "issue TOKEN_AUDIENCE by " + id + "node1 for meshca-agent-.*"},
		{"the agent's SVID, naming a pod beside it", "NODE_VOUCHED_NOT_ALLOWED", "issue NODE_VOUCHED_NOT_ALLOWED by " + id + "node1 for robbed"},
		{"the agent's SVID, with the token of a pod beside it", "granted", "issue issued by " + id + "node1 for robbed"},
	})

	// What an administrator does then: the agent's pod is replaced.
	_, err := s.Kubectl(ctx, "--namespace", helm.Namespace, "delete", "pod", s.agentPod(t).Name)
	check(t, err)
	const gone = "POD_GONE|TOKEN_REJECTED"
	s.steals(t, []attempt{
		{"an SVID for the agent's token", gone, "attest-agent (" + gone + ") by nobody"},
		{"an SVID for the other agent's token", "granted", "attest-agent issued by nobody"},
		{"the agent's SVID, with the token of a pod on the other node", "POD_GONE", ""},
		{"an SVID got by the agent's token, with the token of a pod on the other node", "AGENT_REQUIRED", ""},
		{"the other agent's SVID, with the token of a pod beside the first", "POD_NOT_ON_NODE", "issue POD_NOT_ON_NODE by " + id + "node2 for robbed"},
		{"the agent's SVID, with its own token", "POD_GONE", ""},
		{"the agent's SVID, naming a pod beside it", "POD_GONE", ""},
		{"the agent's SVID, with the token of a pod beside it", "POD_GONE", ""},
	})
	for _, pod := range []*corev1.Pod{elsewhere, agent} {
		check(t, s.DeletePod(ctx, pod, 0))
	}
	check(t, s.Clientset.CoreV1().Nodes().Delete(ctx, otherNode, metav1.DeleteOptions{}))
	s.runs(t, victim)
	s.delete(t, victim)
}

// attempt is one of the thief's: how it ends, and what the CA's audit log says of it, both as regular expressions. Of calls that
// are refused as a whole that has one line in a while for each peer and reason, so those here may have had theirs before: none.
type attempt struct{ what, ends, audit string }

// steals has a thief try, and holds what came of it, and what is in the audit log of that, to what should be there.
func (s *site) steals(t *testing.T, attempts []attempt) {
	t.Helper()
	pod := podOf(namespace, "thief", "thief", "main", s.addressOf(t, "meshca-0"), "/loot")
	pod.Spec.Volumes = []corev1.Volume{{Name: "loot", VolumeSource: corev1.VolumeSource{Secret: &corev1.SecretVolumeSource{SecretName: "loot"}}}}
	pod.Spec.Containers[0].VolumeMounts = []corev1.VolumeMount{{Name: "loot", MountPath: "/loot"}}
	pod = s.create(t, pod)
	s.said(t, pod, "done", 1)
	tried := s.said(t, pod, "tried", len(attempts))
	s.runs(t, pod) // and so has its address
	lines := s.auditOf(t, s.get(t, pod).Status.PodIP)
	for i, a := range attempts {
		if want := regexp.MustCompile("^" + regexp.QuoteMeta(a.what) + ": (" + a.ends + ")$"); !want.MatchString(tried[i].Text) {
			t.Errorf("the thief had %q, want %s", tried[i].Text, want)
		}
		if want := regexp.MustCompile("^" + a.audit + "$"); a.audit != "" && !slices.ContainsFunc(lines, want.MatchString) {
			t.Errorf("of %q there is no line %q in the audit log, which has of the thief\n%s", a.what, want, strings.Join(lines, "\n"))
		}
	}
	s.delete(t, pod)
}

// auditOf are the audit log's lines of calls from an address, in short.
func (s *site) auditOf(t *testing.T, address string) (lines []string) {
	t.Helper()
	log := must(s.PodLogs(t.Context(), helm.Namespace, "meshca-0"))(t)
	for raw := range strings.Lines(log) {
		var l struct{ Msg, Outcome, Peer, Caller, Pod string }
		if json.Unmarshal([]byte(raw), &l) != nil || l.Outcome == "" {
			continue
		}
		if host, _, err := net.SplitHostPort(l.Peer); err != nil || host != address {
			continue
		}
		if l.Caller == "" {
			l.Caller = "nobody"
		}
		line := l.Msg + " " + l.Outcome + " by " + l.Caller
		if l.Pod != "" && l.Msg == "issue" {
			line += " for " + l.Pod
		}
		lines = append(lines, line)
	}
	return lines
}

// lootOf is a Secret with what the node has of its agent and of a pod, and with what the API server gives to the two others.
func (s *site) lootOf(t *testing.T, victim, elsewhere, agent *corev1.Pod) string {
	t.Helper()
	ctx := t.Context()
	onNode := func(path string) []byte { return must(os.ReadFile(s.Path(path)))(t) }
	secret := corev1.Secret{
		TypeMeta: metav1.TypeMeta{APIVersion: "v1", Kind: "Secret"}, ObjectMeta: metav1.ObjectMeta{Namespace: namespace, Name: "loot"},
		Data: map[string][]byte{
			"agent.json":        onNode(runtimeDir + "/keys/agent.json"),
			"agent-token":       onNode("/var/lib/kubelet/pods/" + string(s.agentPod(t).UID) + "/volumes/kubernetes.io~projected/token/token"),
			"pod-token":         onNode(runtimeDir + "/pods/" + s.stands(t, victim).key + "/token"),
			"other-agent-token": []byte(must(s.Token(ctx, agent.Namespace, agent.Spec.ServiceAccountName, agent, "meshca-agent", time.Hour))(t)),
			"other-token":       []byte(must(s.Token(ctx, elsewhere.Namespace, elsewhere.Spec.ServiceAccountName, elsewhere, "meshca", time.Hour))(t)),
			"neighbour.json":    must(json.Marshal(map[string]string{"namespace": victim.Namespace, "name": victim.Name, "uid": string(victim.UID)}))(t),
		},
	}
	return string(must(json.Marshal(secret))(t))
}

// agentPod is the pod of the node's agent.
func (s *site) agentPod(t *testing.T) (agent *corev1.Pod) {
	t.Helper()
	s.eventually(t, "the agent's pod", func(ctx context.Context) error {
		pods, err := s.Clientset.CoreV1().Pods(helm.Namespace).List(ctx, metav1.ListOptions{
			LabelSelector: "app.kubernetes.io/component=agent", FieldSelector: "spec.nodeName=" + node.Name,
		})
		if err != nil {
			return err
		}
		for _, pod := range pods.Items {
			if agent = &pod; pod.DeletionTimestamp == nil && slices.ContainsFunc(pod.Status.Conditions, func(c corev1.PodCondition) bool {
				return c.Type == corev1.PodReady && c.Status == corev1.ConditionTrue
			}) {
				return nil
			}
		}
		return errors.New("it is not ready")
	})
	return agent
}
