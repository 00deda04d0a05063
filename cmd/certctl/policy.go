package main

import (
	"context"
	"fmt"
	"strings"
	"time"

	"github.com/spf13/cobra"

	meshcav1 "github.com/meshca/meshca/api/meshca/v1"
	"github.com/meshca/meshca/api/refusal"
	"github.com/meshca/meshca/ca/policy"
)

const (
	// maxPolicyFile and maxTokenFile bound what is read; a larger token is sent no further than here.
	maxPolicyFile = policy.MaxBytes + 1
	maxTokenFile  = 16 << 10
)

// policyQuestion is what `policy test` was told.
type policyQuestion struct {
	cluster, tokenFile, file, trustDomain string
	maxTTL                                time.Duration
	others                                []string
	same                                  bool
	facts                                 factFlags
}

func (c *cli) policyCommand() *cobra.Command {
	cmd := &cobra.Command{Use: "policy", Short: "Test policy rules"}
	cmd.RunE = c.group(cmd)
	var q policyQuestion
	test := &cobra.Command{
		Use: "test [NAMESPACE/SERVICEACCOUNT]", Short: "What policy makes of a service account or of a token", Args: args(0, 1, "one NAMESPACE/SERVICEACCOUNT, or --token-file"),
		Long: `Shows how each rule was read, and the grant or the refusal; nothing is issued. With --token-file the CA attests
the token first, as it would for a request, and its conditions see that pod. For a service account --label, --annotation,
--namespace-label, --pod and --node say what conditions see; what is not said is not known, and a condition that asks for
it decides nothing.

With --file the rules of a file are read here: what a change would do before it is made. The CA says for which trust
domain, longest life and clusters, and what is denied. With --trust-domain no CA is asked: then --max-ttl is the CA's
svid.ttl (6h if left out), and --other-cluster names the clusters beside --cluster whose identities must not collide with
its own. What was assumed is told with the answer. Exit code 1 for a refusal.`,
		Example: `  certctl policy test payments/api --cluster prod
  certctl policy test --token-file /var/run/secrets/tokens/meshca
  certctl policy test payments/api --label app=api --label tier=gold --node n1
  certctl policy test payments/api --file policy.yaml
  certctl policy test payments/api --file policy.yaml --trust-domain mesh.example --cluster prod --max-ttl 1h`,
	}
	f := test.Flags()
	f.StringVar(&q.cluster, "cluster", "", "the `cluster`; may be left out where the CA has only one")
	f.StringVar(&q.tokenFile, "token-file", "", "a `file` that holds a service-account token; - reads the standard input")
	f.StringVar(&q.file, "file", "", "read the rules of this `file` instead of asking the CA")
	f.StringVar(&q.trustDomain, "trust-domain", "", "with --file: the trust `domain`, instead of asking the CA")
	f.DurationVar(&q.maxTTL, "max-ttl", policy.DefaultMaxTTL, "with --trust-domain: the longest `life`, the CA's svid.ttl")
	f.StringArrayVar(&q.others, "other-cluster", nil, "with --trust-domain: a further `cluster` of the CA (repeat it for more)")
	f.BoolVar(&q.same, "same-namespaces", false, "with --trust-domain: all these clusters have sameNamespaces")
	q.facts.on(test)
	_ = test.MarkFlagFilename("file", "yaml", "yml")
	_ = test.MarkFlagFilename("token-file")
	test.RunE = func(cmd *cobra.Command, args []string) error {
		if err := c.caOnly(cmd); err != nil {
			return err
		}
		ctx, cancel := c.within(cmd)
		defer cancel()
		for _, name := range []string{"max-ttl", "other-cluster", "same-namespaces"} {
			if q.trustDomain == "" && cmd.Flags().Changed(name) {
				return usage("--%s belongs to --trust-domain; the CA knows its own", name)
			}
		}
		facts, err := q.facts.message(cmd)
		if err != nil {
			return err
		}
		r, err := c.testPolicy(ctx, q, facts, args)
		if err != nil {
			return err
		}
		if err := c.show(r, func(p *page) { drawPolicy(p, r) }); err != nil {
			return err
		}
		if r.GetRefusal() != nil {
			return negative
		}
		return nil
	}
	cmd.AddCommand(test)
	return cmd
}

func (c *cli) testPolicy(ctx context.Context, q policyQuestion, facts *meshcav1.PolicyFacts, args []string) (*meshcav1.TestPolicyResponse, error) {
	r := &meshcav1.TestPolicyRequest{Cluster: q.cluster, Facts: facts}
	switch {
	case (len(args) == 1) == (q.tokenFile != ""):
		return nil, usage("policy test takes NAMESPACE/SERVICEACCOUNT or --token-file, one of them")
	case q.tokenFile != "" && facts != nil:
		return nil, usage("the token's pod is looked at: leave --%s out", strings.Join(factFlagNames[:], ", --"))
	case q.file != "" && q.tokenFile != "":
		return nil, usage("--file reads rules without a CA, and only the CA can attest a token: name the service account instead of --token-file")
	case q.file == "" && q.trustDomain != "":
		return nil, usage("--trust-domain belongs to --file; the CA knows its own")
	case q.trustDomain != "" && q.cluster == "":
		return nil, usage("--trust-domain needs --cluster: without a CA nothing else says it")
	}
	if len(args) == 1 {
		ns, sa, ok := strings.Cut(args[0], "/")
		if !ok || ns == "" || sa == "" || strings.Contains(sa, "/") {
			return nil, usage("%.64q is not NAMESPACE/SERVICEACCOUNT", args[0])
		}
		r.Namespace, r.ServiceAccount = ns, sa
	}
	if q.file != "" {
		return c.testPolicyFile(ctx, q, r)
	}
	if q.tokenFile != "" {
		token, err := c.readToken(ctx, q.tokenFile)
		if err != nil {
			return nil, err
		}
		r.Token = token
	}
	conn, err := c.openCA(ctx)
	if err != nil {
		return nil, err
	}
	defer conn.Close()
	answer, err := conn.CA.TestPolicy(ctx, r)
	if err != nil {
		return nil, theCA.failed(err)
	}
	return answer, nil
}

func (c *cli) readToken(ctx context.Context, path string) (string, error) {
	b, err := c.read(ctx, "the token", path, maxTokenFile)
	if err != nil {
		return "", err
	}
	token := strings.TrimSpace(string(b))
	if token == "" {
		return "", no("the token file is empty", nil, refusal.TokenMalformed.Do())
	}
	return token, nil
}

func drawPolicy(p *page, r *meshcav1.TestPolicyResponse) {
	name := "The token's service account is not known"
	if r.GetNamespace() != "" {
		name = fmt.Sprintf("Service account %s/%s of cluster %s", r.GetNamespace(), r.GetServiceAccount(), r.GetCluster())
	}
	p.line("%s", name)
	drawFacts(p, r.GetFacts())
	var rows [][]cell
	for _, rd := range r.GetRules() {
		number, tone := fmt.Sprint(rd.GetNumber()), plainTone
		if rd.GetNumber() == 0 {
			number = "-"
		}
		matched := "no"
		if rd.GetMatched() {
			matched, tone = "yes", good
		}
		rows = append(rows, []cell{text(number), text(rd.GetName()), text(matched).as(tone), text(oneLine(rd.GetWhen())), text(rd.GetWhy())})
	}
	if len(rows) > 0 {
		p.gap()
		p.table([]string{"RULE", "NAME", "MATCHES", "CONDITION", "WHY"}, rows)
	}
	p.gap()
	defer drawAssumptions(p, r.GetAssumptions())
	if x := r.GetRefusal(); x != nil {
		p.pairs(pair{"refused", text(x.GetReason()).as(bad)}, pair{"why", text(x.GetMessage())}, pair{"what to do", text(refusal.Reason(x.GetReason()).Do())})
		return
	}
	g := r.GetGrant()
	yes := func(set bool, what string) cell {
		if set {
			return text("yes: " + what)
		}
		return cell{}
	}
	p.pairs(pair{"granted", text(g.GetSpiffeId()).as(good)}, pair{"for at most", text(spell(g.GetTtl().AsDuration()))},
		pair{"DNS names", text(strings.Join(g.GetDnsNames(), " "))},
		pair{"direct", yes(g.GetDirect(), "the workload may call the CA itself")},
		pair{"node-vouched", yes(g.GetNodeVouched(), "an agent may ask without the pod's token")},
		pair{"server keys", yes(g.GetServerKeys(), "without effect yet, no door of this version makes keys")},
		pair{"by", text(ruleName(g.GetRule()))})
}

// oneLine is a condition as it fits into a table's cell.
func oneLine(condition string) string { return strings.Join(strings.Fields(condition), " ") }

func ruleName(name string) string {
	if name == policy.DefaultRule {
		return "the default: no rules are written"
	}
	return name
}
