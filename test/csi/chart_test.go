package csi

import (
	"testing"

	"github.com/meshca/meshca/test/helm"
	"github.com/meshca/meshca/test/node"
)

// TestUnderTheChart is what an installation has to stand: pods that try what is not theirs, and many at once.
func TestUnderTheChart(t *testing.T) {
	s := &site{Node: node.Start(t), t: t}
	ctx := t.Context()
	h := must(helm.Prepare(ctx, s.Node, func(what string) { t.Log(what) }))(t)
	check(t, s.Import(ctx, must(node.Programs(ctx, tenant, s.Dir(), "./test/csi/tenant"))(t)))
	must(s.CreateNamespace(ctx, namespace))(t)
	check(t, h.Install(ctx, "--set", "trustDomain=mesh.test"))
	if !t.Run("a pod that tries", func(t *testing.T) { attacker(t, s) }) {
		return
	}
	t.Run("a hundred pods at once", func(t *testing.T) { crowd(t, s) })
}
