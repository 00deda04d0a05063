package csi

import (
	"testing"

	"github.com/meshca/meshca/test/helm"
	"github.com/meshca/meshca/test/node"
)

// TestUnderTheChart is what an installation has to stand, on a cluster that gives the CA's pod a user as OpenShift does: pods
// that try what is not theirs, service accounts that go, agents that are replaced, and many pods at once.
func TestUnderTheChart(t *testing.T) {
	s := &site{Node: node.Start(t), t: t}
	ctx := t.Context()
	h := must(helm.Prepare(ctx, s.Node, func(what string) { t.Log(what) }))(t)
	check(t, s.Import(ctx, must(node.Programs(ctx, tenant, s.Dir(), "./test/csi/tenant"))(t)))
	must(s.CreateNamespace(ctx, namespace))(t)
	asOpenShift(t, s)
	check(t, h.Install(ctx, "--set", "trustDomain=mesh.test"))
	for _, part := range []struct {
		name string
		test func(*testing.T)
	}{
		{"a user that is not the image's", func(t *testing.T) { anyUser(t, s, h) }},
		{"a pod that tries", func(t *testing.T) { attacker(t, s) }},
		{"what is stolen from a node", func(t *testing.T) { theft(t, s) }},
		{"service accounts are deleted", func(t *testing.T) { accountsDeleted(t, s) }},
		{"the agents are rolled", func(t *testing.T) { rolled(t, s, h) }},
		{"a hundred pods at once", func(t *testing.T) { crowd(t, s) }},
	} {
		if !t.Run(part.name, part.test) {
			return
		}
	}
}
