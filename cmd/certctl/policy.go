package main

import (
	"context"
	"fmt"
	"strings"

	"github.com/spf13/cobra"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/protobuf/types/known/durationpb"

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
type policyQuestion struct{ cluster, tokenFile, file, trustDomain string }

func (c *cli) policyCommand() *cobra.Command {
	cmd := &cobra.Command{Use: "policy", Short: "Test policy rules"}
	cmd.RunE = c.group(cmd)
	var q policyQuestion
	test := &cobra.Command{
		Use: "test [NAMESPACE/SERVICEACCOUNT]", Short: "What policy makes of a service account or of a token", Args: args(0, 1, "one NAMESPACE/SERVICEACCOUNT, or --token-file"),
		Long: `Shows how each rule was read, and the grant or the refusal; nothing is issued. With --token-file the CA attests
the token first, as it would for a request. With --file the rules of a file are read here, without a CA:
what a change would do before it is made. Exit code 1 for a refusal.`,
		Example: `  certctl policy test payments/api --cluster prod
  certctl policy test --token-file /var/run/secrets/tokens/meshca
  certctl policy test payments/api --file policy.yaml --trust-domain mesh.example --cluster prod`,
	}
	f := test.Flags()
	f.StringVar(&q.cluster, "cluster", "", "the `cluster`; may be left out where the CA has only one")
	f.StringVar(&q.tokenFile, "token-file", "", "a `file` that holds a service-account token; - reads the standard input")
	f.StringVar(&q.file, "file", "", "read the rules of this `file` instead of asking the CA")
	f.StringVar(&q.trustDomain, "trust-domain", "", "the trust `domain`, with --file")
	_ = test.MarkFlagFilename("file", "yaml", "yml")
	_ = test.MarkFlagFilename("token-file")
	test.RunE = func(cmd *cobra.Command, args []string) error {
		if err := c.caOnly(cmd); err != nil {
			return err
		}
		ctx, cancel := c.within(cmd)
		defer cancel()
		r, err := c.testPolicy(ctx, q, args)
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

func (c *cli) testPolicy(ctx context.Context, q policyQuestion, args []string) (*meshcav1.TestPolicyResponse, error) {
	r := &meshcav1.TestPolicyRequest{Cluster: q.cluster}
	switch {
	case (len(args) == 1) == (q.tokenFile != ""):
		return nil, usage("policy test takes NAMESPACE/SERVICEACCOUNT or --token-file, one of them")
	case q.file != "" && q.tokenFile != "":
		return nil, usage("--file reads rules without a CA, and only the CA can attest a token: name the service account instead of --token-file")
	case q.file == "" && q.trustDomain != "":
		return nil, usage("--trust-domain belongs to --file; the CA knows its own")
	}
	if len(args) == 1 {
		ns, sa, ok := strings.Cut(args[0], "/")
		if !ok || ns == "" || sa == "" || strings.Contains(sa, "/") {
			return nil, usage("%q is not NAMESPACE/SERVICEACCOUNT", args[0])
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

// testPolicyFile answers as the CA would whose policy the file is.
func (c *cli) testPolicyFile(ctx context.Context, q policyQuestion, r *meshcav1.TestPolicyRequest) (*meshcav1.TestPolicyResponse, error) {
	if q.trustDomain == "" || q.cluster == "" {
		return nil, usage("--file needs --trust-domain and --cluster: without a CA nothing else says them")
	}
	td, err := spiffeid.TrustDomainFromString(q.trustDomain)
	if err != nil || td.Name() != q.trustDomain {
		return nil, usage("--trust-domain %q is not a trust domain's name", q.trustDomain)
	}
	data, err := c.read(ctx, "the policy", q.file, maxPolicyFile)
	if err != nil {
		return nil, err
	}
	rules, err := policy.Parse(data, policy.PolicyContext{TrustDomain: td})
	if err != nil {
		return nil, no(q.file+" would not be put in force", err, "")
	}
	answer := &meshcav1.TestPolicyResponse{Cluster: q.cluster, Namespace: r.GetNamespace(), ServiceAccount: r.GetServiceAccount()}
	readings, d, err := rules.Read(policy.Input{Cluster: q.cluster, Namespace: r.GetNamespace(), ServiceAccount: r.GetServiceAccount()})
	for _, rd := range readings {
		answer.Rules = append(answer.Rules, &meshcav1.RuleReading{Number: uint32(rd.Number), Name: rd.Name, Matched: rd.Matched, Why: rd.Why})
	}
	if e, ok := refusal.From(err); ok {
		answer.Refusal = &meshcav1.Refusal{Code: uint32(e.Reason.Code()), Reason: string(e.Reason), Message: e.Detail}
		return answer, nil
	}
	if err != nil {
		return nil, no("the policy could not be read for it", err, "")
	}
	answer.Grant = &meshcav1.Grant{SpiffeId: d.ID.String(), Ttl: durationpb.New(d.TTL), DnsNames: d.DNSNames, Rule: d.Rule}
	return answer, nil
}

func drawPolicy(p *page, r *meshcav1.TestPolicyResponse) {
	name := "The token's service account is not known"
	if r.GetNamespace() != "" {
		name = fmt.Sprintf("Service account %s/%s of cluster %s", r.GetNamespace(), r.GetServiceAccount(), r.GetCluster())
	}
	p.line("%s", name)
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
		rows = append(rows, []cell{text(number), text(rd.GetName()), text(matched).as(tone), text(rd.GetWhy())})
	}
	if len(rows) > 0 {
		p.gap()
		p.table([]string{"RULE", "NAME", "MATCHES", "WHY"}, rows)
	}
	p.gap()
	if x := r.GetRefusal(); x != nil {
		p.pairs(pair{"refused", text(x.GetReason()).as(bad)}, pair{"why", text(x.GetMessage())}, pair{"what to do", text(refusal.Reason(x.GetReason()).Do())})
		return
	}
	g := r.GetGrant()
	p.pairs(pair{"granted", text(g.GetSpiffeId()).as(good)}, pair{"for at most", text(spell(g.GetTtl().AsDuration()))},
		pair{"DNS names", text(strings.Join(g.GetDnsNames(), " "))}, pair{"by", text(ruleName(g.GetRule()))})
}

func ruleName(name string) string {
	if name == policy.DefaultRule {
		return "the default: no rules are written"
	}
	return name
}
