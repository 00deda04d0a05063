package csi

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
	corev1 "k8s.io/api/core/v1"
)

// volume is a pod's, as it lies on the node.
type volume struct {
	key, target string
	// dir is where this program finds it; inside is what the pod sees of it.
	dir, inside string
}

// volumeOf finds a pod's volume by what the driver wrote down of it.
func (s *site) volumeOf(pod *corev1.Pod) (v volume, ok bool) {
	found, _ := filepath.Glob(s.Path(runtimeDir + "/pods/*/state.json"))
	for _, file := range found {
		var state struct {
			Target string
			Pod    struct{ UID string }
		}
		text, err := os.ReadFile(file)
		if err != nil || json.Unmarshal(text, &state) != nil || state.Pod.UID != string(pod.UID) {
			continue
		}
		dir := filepath.Dir(file)
		return volume{key: filepath.Base(dir), target: state.Target, dir: dir, inside: filepath.Join(dir, "mount")}, true
	}
	return volume{}, false
}

// stands is volumeOf for a pod that has a volume.
func (s *site) stands(t *testing.T, pod *corev1.Pod) volume {
	t.Helper()
	v, ok := s.volumeOf(pod)
	if !ok {
		t.Fatalf("pod %s has no volume on the node", pod.Name)
	}
	return v
}

// mountsWith are the node's mounts whose line in mountinfo holds a text.
func (s *site) mountsWith(t *testing.T, text string) (found []string) {
	t.Helper()
	all := must(os.ReadFile(s.Path("/proc/1/mountinfo")))(t)
	for line := range strings.Lines(string(all)) {
		if strings.Contains(line, text) {
			found = append(found, strings.TrimSpace(line))
		}
	}
	return found
}

// left is what there is of a pod's volume on the node.
func (s *site) left(t *testing.T, pod *corev1.Pod) (found []string) {
	t.Helper()
	found = s.mountsWith(t, string(pod.UID))
	if v, ok := s.volumeOf(pod); ok {
		found = append(found, v.dir)
		found = append(found, s.mountsWith(t, v.key)...)
	}
	if w := s.held(t, pod); w != nil {
		found = append(found, "the agent's workload "+w.GetSocket())
	}
	if _, err := os.Lstat(s.Path("/var/lib/kubelet/pods/" + string(pod.UID))); !errors.Is(err, fs.ErrNotExist) {
		found = append(found, fmt.Sprintf("the kubelet's folder of the pod (%v)", err))
	}
	// One key for each volume; whose it is its name does not tell.
	volumes, _ := filepath.Glob(s.Path(runtimeDir + "/pods/*"))
	keys, _ := filepath.Glob(s.Path(runtimeDir + "/keys/svid-*"))
	if len(keys) > len(volumes) {
		found = append(found, fmt.Sprintf("%d keys for %d volumes", len(keys), len(volumes)))
	}
	return found
}

// nothingOf waits until nothing of a pod is left on the node.
func (s *site) nothingOf(t *testing.T, pod *corev1.Pod) {
	t.Helper()
	s.eventually(t, "nothing to be left of pod "+pod.Name, func(context.Context) error {
		if left := s.left(t, pod); len(left) > 0 {
			return fmt.Errorf("left are %v", left)
		}
		return nil
	})
}

// inode tells one directory from another that is made in its place.
func inode(t *testing.T, path string) uint64 {
	t.Helper()
	var st unix.Stat_t
	check(t, unix.Stat(path, &st))
	return st.Ino
}

// republished waits for the kubelet's next call for a pod's volume: the driver then has its token again, which is taken
// away here.
func (s *site) republished(t *testing.T, pod *corev1.Pod) {
	t.Helper()
	token := filepath.Join(s.stands(t, pod).dir, "token")
	check(t, os.Remove(token))
	s.eventually(t, "a republish for pod "+pod.Name, func(context.Context) error {
		_, err := os.Stat(token)
		return err
	})
}

// runs waits until the API server has heard that a pod runs, and fails where a container of it was started more than once.
func (s *site) runs(t *testing.T, pod *corev1.Pod) {
	t.Helper()
	s.eventually(t, "pod "+pod.Name+" to run", func(context.Context) error {
		is := s.get(t, pod)
		for _, c := range is.Status.ContainerStatuses {
			if c.RestartCount > 0 {
				t.Fatalf("a container of pod %s was started again: %+v", pod.Name, c)
			}
		}
		if is.Status.Phase != corev1.PodRunning {
			return fmt.Errorf("it is %s; events %v", is.Status.Phase, s.events(pod))
		}
		return nil
	})
}
