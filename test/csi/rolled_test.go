package csi

import (
	"slices"
	"testing"
	"time"

	"github.com/meshca/meshca/test/figures"
	"github.com/meshca/meshca/test/helm"
)

// rolled rolls the agents' DaemonSet and tells how long a pod's proxy had nobody at its socket: from the end of its stream
// until it was served again, trying all the time. The image is on the node. Most is what an agent takes that has to be
// killed; half of the rolls must do without, since a machine that stops for a moment does not hold up so many.
func rolled(t *testing.T, s *site, h *helm.Site) {
	const times, aim, most = 3, 5 * time.Second, 30 * time.Second
	ctx, sheet := t.Context(), figures.For(t)
	web := s.create(t, identified(podOf(namespace, "web", "watch", socket)))
	serial := s.said(t, web, "secret", 2)[1].Serial
	var away []time.Duration
	for range times {
		began := time.Now()
		_, err := s.Kubectl(ctx, "--namespace", helm.Namespace, "rollout", "restart", "daemonset/meshca-agent")
		check(t, err)
		closed := s.saidSince(t, web, "closed", began)
		back := s.saidSince(t, web, "secret", closed.At)
		check(t, h.RolledOut(ctx))
		if back.ID != idOf(web) || back.Serial != serial {
			t.Errorf("after its agent was replaced the pod has %+v", back)
		}
		away = append(away, back.At.Sub(closed.At))
	}
	slices.Sort(away)
	sheet.Add("the DaemonSet rolled %d times: a pod's socket was away for %v to %v", times, away[0].Round(time.Millisecond), away[times-1].Round(time.Millisecond))
	if away[times/2] > aim || away[times-1] > most {
		t.Errorf("a pod's socket was away for %v; half of the rolls are to take %v at most, and none more than %v", away, aim, most)
	}
	s.runs(t, web)
	s.delete(t, web)
}
