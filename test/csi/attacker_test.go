package csi

import (
	"os"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/meshca/meshca/test/helm"
)

// Pods that have a volume of their own, one as root and one not, try all that they know of another's: where it lies on the
// node, its name, the node's programs and the installation's pods, the CA with the other's token. That the attempts would
// be seen if they succeeded shows a pod whose author may mount the node's folders, which is what must not be given away.
func attacker(t *testing.T, s *site) {
	victim := s.create(t, identified(podOf(namespace, "victim", "first", socket), "files", "tls"))
	s.said(t, victim, "secret", 1)
	v := s.stands(t, victim)
	dir := runtimeDir + "/pods/" + v.key
	paths := []string{
		v.target, v.target + "/socket", v.target + "/tls.key", dir, dir + "/token", dir + "/state.json", dir + "/mount/socket", dir + "/mount/tls.key",
		runtimeDir, runtimeDir + "/admin.sock", runtimeDir + "/keys", "/var/lib/volumes/ca",
		"/var/lib/kubelet/plugins/csi.meshca.io/csi.sock", "/var/lib/kubelet/pods/" + string(victim.UID),
	}
	token := strings.TrimSpace(string(must(os.ReadFile(s.Path(dir + "/token")))(t))) // as if it had leaked
	raid := append([]string{"raid", socket, idOf(victim), "main", s.addressOf(t, "meshca-0"), s.addressOf(t, "meshca-agent-"), token}, paths...)
	user := int64(1000)
	asUser := podOf(namespace, "raider-user", raid...)
	asUser.Spec.SecurityContext = &corev1.PodSecurityContext{RunAsUser: &user, FSGroup: &user}
	for _, pod := range []*corev1.Pod{identified(podOf(namespace, "raider-root", raid...)), identified(asUser)} {
		pod = s.create(t, pod)
		end := s.said(t, pod, "raided", 1)[0]
		t.Logf("pod %s: %s", pod.Name, end.Text)
		if end.ID != idOf(pod) || !strings.HasSuffix(end.Text, " 0 of them with success") {
			all, _ := s.lines(pod)
			t.Errorf("pod %s, which is %s: %v", pod.Name, end.ID, all)
		}
		s.delete(t, pod)
	}
	mighty := identified(podOf(namespace, "mighty", raid...))
	folder := "/run/meshca-agent"
	mighty.Spec.Volumes = append(mighty.Spec.Volumes, corev1.Volume{Name: "node", VolumeSource: corev1.VolumeSource{HostPath: &corev1.HostPathVolumeSource{Path: folder}}})
	mighty.Spec.Containers[0].VolumeMounts = append(mighty.Spec.Containers[0].VolumeMounts, corev1.VolumeMount{Name: "node", MountPath: "/host" + folder})
	mighty = s.create(t, mighty)
	opened := map[string]bool{}
	s.said(t, mighty, "raided", 1) // it is through
	for _, l := range s.said(t, mighty, "success", 5) {
		opened[l.Text] = true
	}
	for _, path := range []string{dir + "/token", dir + "/mount/socket", dir + "/mount/tls.key", runtimeDir + "/admin.sock"} {
		if !opened["opening /host"+path] {
			t.Errorf("the attempts would not be noticed: %s is to be open to this pod, and it opened %v", path, opened)
		}
	}
	s.delete(t, mighty)
	s.said(t, victim, "secret", 1)
	s.runs(t, victim)
	s.delete(t, victim)
}

// addressOf is that of the one pod of the installation whose name begins so.
func (s *site) addressOf(t *testing.T, name string) (address string) {
	t.Helper()
	for _, pod := range must(s.Clientset.CoreV1().Pods(helm.Namespace).List(t.Context(), metav1.ListOptions{}))(t).Items {
		if strings.HasPrefix(pod.Name, name) && pod.Status.PodIP != "" {
			address = pod.Status.PodIP
		}
	}
	if address == "" {
		t.Fatalf("no pod %s… has an address", name)
	}
	return address
}
