package csi

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"

	"github.com/meshca/meshca/test/figures"
	"github.com/meshca/meshca/test/node"
)

// Proxies reconnect to the socket that appears in the directory that they have, whether the agent was asked to end, was
// killed, or has been away for a while: also without the CA. How long they had none is told, and bounded: by what a machine
// with other work may need, and far below what the CA's absence or a retry would take.
func agentRestarted(t *testing.T, s *site) {
	const mostAway = 10 * time.Second
	ctx, sheet := t.Context(), figures.For(t)
	web := s.create(t, identified(podOf(namespace, "web", "watch", socket), "files", "tls"))
	s.said(t, web, "secret", 2)
	v := s.stands(t, web)
	before := inode(t, v.inside)
	for _, restart := range []struct {
		how  string
		stop func(context.Context, string) error
		away time.Duration
		noCA bool
	}{
		{how: "ended", stop: s.EndProgram},
		{how: "killed", stop: s.StopProgram},
		{how: "away for a while", stop: s.EndProgram, away: 15 * time.Second}, // the kubelet republishes meanwhile, in vain
		{how: "killed without the CA", stop: s.StopProgram, noCA: true},
	} {
		if restart.noCA {
			check(t, s.StopProgram(ctx, "meshca"))
		}
		stopped := time.Now()
		check(t, restart.stop(ctx, "meshca-agent"))
		time.Sleep(restart.away)
		began := time.Now()
		check(t, s.StartProgram(ctx, "meshca-agent"))
		back := s.saidSince(t, web, "secret", began)
		var closed time.Time
		for _, l := range must(s.lines(web))(t) {
			if l.What == "closed" && l.At.After(stopped) && l.At.Before(back.At) && closed.IsZero() {
				closed = l.At // a busy machine tells the proxy when the next agent is there already
			}
		}
		away := back.At.Sub(closed) - restart.away
		sheet.Add("agent %s: the proxy had its identity again %v after the agent was started, %v after its stream ended (without the pause)", restart.how,
			back.At.Sub(began).Round(time.Millisecond), away.Round(time.Millisecond))
		if !closed.IsZero() && away > mostAway {
			t.Errorf("agent %s: the proxy was without a socket for %v, more than %v", restart.how, away, mostAway)
		}
		if back.ID != idOf(web) || closed.IsZero() || inode(t, v.inside) != before {
			t.Errorf("%s: %+v in another directory", restart.how, back)
		}
		if restart.noCA {
			s.startCA(t)
		}
		if restart.away > 0 {
			s.republished(t, web)
		}
		s.runs(t, web)
	}
	s.renewed(t, web)
	s.delete(t, web)
}

// A kubelet that starts has forgotten the tokens that it had, so its first republish brings a fresh one.
func kubeletRestarted(t *testing.T, s *site) {
	ctx := t.Context()
	web := s.create(t, identified(podOf(namespace, "web", "watch", socket)))
	serial := s.said(t, web, "secret", 2)[1].Serial
	v := s.stands(t, web)
	token, mounted, before := claimsOf(t, v).ID, s.mountsWith(t, v.key), inode(t, v.inside)
	check(t, s.StopProgram(ctx, "kubelet"))
	s.renew(t) // nobody needs the kubelet for that, as long as the token lasts
	s.eventually(t, "a renewal without the kubelet", func(context.Context) error {
		if now := s.held(t, web).GetSvid().GetSerial(); now == serial {
			return errors.New("the old one")
		}
		return nil
	})
	check(t, s.StartProgram(ctx, "kubelet"))
	s.eventually(t, "a fresh token", func(context.Context) error {
		if now := claimsOf(t, v).ID; now == token {
			return fmt.Errorf("the volume has the token of before")
		}
		return nil
	})
	if now := s.mountsWith(t, v.key); strings.Join(now, "\n") != strings.Join(mounted, "\n") || inode(t, v.inside) != before {
		t.Errorf("before the kubelet's restart there was mounted %v, now %v", mounted, now)
	}
	fresh := time.Now()
	s.renew(t) // with the new token
	s.saidSince(t, web, "secret", fresh)
	later := s.create(t, identified(podOf(namespace, "later", "first", socket)))
	s.said(t, later, "secret", 1)
	for _, pod := range []*corev1.Pod{web, later} {
		s.runs(t, pod)
		s.delete(t, pod)
	}
}

func containerdRestarted(t *testing.T, s *site) {
	ctx := t.Context()
	web := s.create(t, identified(podOf(namespace, "web", "watch", socket)))
	s.said(t, web, "secret", 2)
	check(t, s.StopProgram(ctx, "containerd"))
	stopped := time.Now()
	s.renew(t)
	s.eventually(t, "a renewal without containerd", func(context.Context) error {
		if w := s.held(t, web); w.GetState() != "fresh" || w.GetOpenStreams() != 1 {
			return fmt.Errorf("%v", w)
		}
		return nil
	})
	check(t, s.StartProgram(ctx, "containerd"))
	s.saidSince(t, web, "secret", stopped)
	s.republished(t, web)
	later := s.create(t, identified(podOf(namespace, "later", "first", socket)))
	s.said(t, later, "secret", 1)
	for _, pod := range []*corev1.Pod{web, later} {
		s.runs(t, pod)
		s.delete(t, pod)
	}
}

// Pods that were forced away while the agent, and then the kubelet too, could not be told leave nothing either.
func orphans(t *testing.T, s *site) {
	ctx := t.Context()
	forced, forgotten := s.create(t, identified(podOf(namespace, "forced", "first", socket))), s.create(t, identified(podOf(namespace, "forgotten", "first", socket)))
	stays := s.create(t, identified(podOf(namespace, "stays", "watch", socket)))
	for _, pod := range []*corev1.Pod{forced, forgotten, stays} {
		s.said(t, pod, "secret", 1)
	}
	check(t, s.EndProgram(ctx, "meshca-agent"))
	check(t, s.DeletePod(ctx, forced, 0))
	s.eventually(t, "the kubelet to end the container", func(context.Context) error {
		if _, err := s.lines(forced); err == nil {
			return errors.New("it still has its log")
		}
		return nil
	})
	check(t, s.StopProgram(ctx, "kubelet"))
	check(t, s.DeletePod(ctx, forgotten, 0))
	for _, pod := range []*corev1.Pod{forced, forgotten} {
		if len(s.mountsWith(t, string(pod.UID))) == 0 {
			t.Errorf("nothing is left of pod %s to be cleaned", pod.Name)
		}
	}
	check(t, s.StartProgram(ctx, "kubelet"))
	back := time.Now()
	check(t, s.StartProgram(ctx, "meshca-agent"))
	s.nothingOf(t, forced)
	s.nothingOf(t, forgotten)
	s.saidSince(t, stays, "secret", back)
	s.runs(t, stays)
	s.delete(t, stays)
}

// A reboot as far as it can be had here: all containers end at once, and with the node's programs go the mounts and what
// lies in memory. The kubelet's folders and the API server's objects stay.
func reboot(t *testing.T, s *site) {
	ctx := t.Context()
	web, gone := podOf(namespace, "web", "first", socket), s.create(t, identified(podOf(namespace, "gone", "first", socket)))
	web.Spec.RestartPolicy = corev1.RestartPolicyAlways
	web = s.create(t, identified(web, "files", "tls"))
	for _, pod := range []*corev1.Pod{web, gone} {
		s.said(t, pod, "secret", 1)
	}
	serial, v := s.said(t, web, "secret", 1)[0].Serial, s.stands(t, web)
	check(t, s.StopProgram(ctx, "kubelet"))
	s.killContainers(t)
	check(t, s.StopProgram(ctx, "containerd"))
	check(t, s.StopProgram(ctx, "meshca-agent"))
	for _, pod := range []*corev1.Pod{web, gone} {
		must(s.Inside(ctx, "umount", s.stands(t, pod).target))(t)
	}
	check(t, os.RemoveAll(s.Path(runtimeDir)))
	check(t, s.DeletePod(ctx, gone, 0)) // while the node was off
	for _, program := range []string{"containerd", "meshca-agent", "kubelet"} {
		check(t, s.StartProgram(ctx, program))
	}
	s.eventually(t, "the pod to run again", func(ctx context.Context) error {
		got, err := s.lines(web)
		if err == nil && (len(got) != 2 || got[1].What != "secret" || got[1].Serial == serial) {
			err = fmt.Errorf("it has printed %v; events %v", got, s.events(web))
		}
		return err
	})
	if now := s.stands(t, web); now.key != v.key {
		t.Errorf("the kubelet asked for another volume: %s, before %s", now.key, v.key)
	}
	if _, err := os.Stat(filepath.Join(s.stands(t, web).inside, "tls.key")); err != nil {
		t.Error(err)
	}
	s.nothingOf(t, gone)
	s.delete(t, web)
}

// killContainers kills them all, and waits until they are dead.
func (s *site) killContainers(t *testing.T) {
	t.Helper()
	ctr := func(args ...string) []string {
		out := must(s.Inside(t.Context(), append([]string{"/run/parts/ctr", "--namespace", "k8s.io", "tasks"}, args...)...))(t)
		return strings.Fields(out)
	}
	for _, task := range ctr("list", "--quiet") {
		_, _ = s.Inside(t.Context(), "/run/parts/ctr", "--namespace", "k8s.io", "tasks", "kill", "--signal", "SIGKILL", task)
	}
	s.eventually(t, "all containers to be dead", func(ctx context.Context) error {
		if list := must(s.Inside(ctx, "/run/parts/ctr", "--namespace", "k8s.io", "tasks", "list"))(t); strings.Contains(list, "RUNNING") {
			return errors.New(list)
		}
		return nil
	})
}

// allGone: of everything that the parts before made nothing is left on the node, nor in the driver.
func allGone(t *testing.T, s *site) {
	s.eventually(t, "nothing to be left", func(ctx context.Context) error {
		var left []string
		for _, pattern := range []string{"/pods/*", "/keys/svid-*"} {
			found, _ := filepath.Glob(s.Path(runtimeDir + pattern))
			left = append(left, found...)
		}
		left = append(left, s.mountsWith(t, "kubernetes.io~csi")...)
		left = append(left, s.mountsWith(t, "meshca-agent")...)
		if len(left) > 0 {
			return fmt.Errorf("left are %v", left)
		}
		return nil
	})
	if out, err := s.Inside(t.Context(), node.Inner+"/certctl", "check", "--agent="+runtimeDir+"/admin.sock"); err != nil {
		t.Errorf("certctl check: %v\n%s", err, out)
	}
}
