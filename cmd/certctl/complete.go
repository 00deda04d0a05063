package main

import (
	"context"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/meshca/meshca/api/admin/client"
	meshcav1 "github.com/meshca/meshca/api/meshca/v1"
	"github.com/meshca/meshca/api/refusal"
)

// completionWait bounds what a press of the Tab key may take; completionEntries what it asks the ledger for.
const (
	completionWait    = time.Second
	completionEntries = 500
)

// completeIDs offers the SPIFFE IDs of the newest live entries of the ledger.
func (c *cli) completeIDs(cmd *cobra.Command, given []string, typed string) ([]string, cobra.ShellCompDirective) {
	if len(given) > 0 {
		return nil, cobra.ShellCompDirectiveNoFileComp
	}
	ctx, cancel := context.WithTimeout(cmd.Context(), completionWait)
	defer cancel()
	entries, err := c.ledger(ctx, &meshcav1.ListSVIDsRequest{Limit: completionEntries})
	if err != nil {
		return nil, cobra.ShellCompDirectiveNoFileComp
	}
	var ids []string
	for _, e := range entries {
		ids = append(ids, e.GetSpiffeId())
	}
	return distinct(ids, typed), cobra.ShellCompDirectiveNoFileComp
}

// completeDenied offers what is denied.
func (c *cli) completeDenied(cmd *cobra.Command, given []string, typed string) ([]string, cobra.ShellCompDirective) {
	if len(given) > 0 {
		return nil, cobra.ShellCompDirectiveNoFileComp
	}
	ctx, cancel := context.WithTimeout(cmd.Context(), completionWait)
	defer cancel()
	conn, err := client.Open(ctx, c.socket)
	if err != nil {
		return nil, cobra.ShellCompDirectiveNoFileComp
	}
	defer conn.Close()
	r, err := conn.CA.ListDenials(ctx, &meshcav1.ListDenialsRequest{})
	if err != nil {
		return nil, cobra.ShellCompDirectiveNoFileComp
	}
	var ids []string
	for _, d := range r.GetDenials() {
		ids = append(ids, d.GetSpiffeId()+"\t"+plain(d.GetWhy()))
	}
	return distinct(ids, typed), cobra.ShellCompDirectiveNoFileComp
}

// completeExplain offers reasons and "pod", and IDs once one is begun.
func (c *cli) completeExplain(cmd *cobra.Command, given []string, typed string) ([]string, cobra.ShellCompDirective) {
	if len(given) > 0 {
		return nil, cobra.ShellCompDirectiveNoFileComp
	}
	if strings.HasPrefix(typed, "s") {
		return c.completeIDs(cmd, given, typed)
	}
	offers := []string{"pod\ta pod, as NAMESPACE/NAME"}
	for _, r := range refusal.All() {
		offers = append(offers, string(r)+"\t"+r.What())
	}
	return distinct(offers, strings.ToUpper(strings.ReplaceAll(typed, "-", "_")), "pod"), cobra.ShellCompDirectiveNoFileComp
}

// distinct keeps, in order, one of each that begins with the prefix, and those that are always offered.
func distinct(offers []string, prefix string, always ...string) []string {
	slices.Sort(offers)
	return slices.DeleteFunc(slices.Compact(offers), func(o string) bool {
		word, _, _ := strings.Cut(o, "\t")
		return !strings.HasPrefix(o, prefix) && !slices.Contains(always, word)
	})
}

// completeRoots offers the trust bundle's roots.
func (c *cli) completeRoots(cmd *cobra.Command, _ []string, typed string) ([]string, cobra.ShellCompDirective) {
	return c.offer(cmd, typed, func(a *meshcav1.GetAuthoritiesResponse) (offers []string) {
		for _, r := range a.GetRoots() {
			offers = append(offers, shortID(r.GetId())+"\t"+plain(r.GetSubject()+", "+r.GetState()))
		}
		return offers
	})
}

// completeRootArgument offers roots for an only argument.
func (c *cli) completeRootArgument(cmd *cobra.Command, given []string, typed string) ([]string, cobra.ShellCompDirective) {
	if len(given) > 0 {
		return nil, cobra.ShellCompDirectiveNoFileComp
	}
	return c.completeRoots(cmd, given, typed)
}

// completeIssuers offers the upstream's issuers that a root can be rotated to.
func (c *cli) completeIssuers(cmd *cobra.Command, _ []string, typed string) ([]string, cobra.ShellCompDirective) {
	return c.offer(cmd, typed, func(a *meshcav1.GetAuthoritiesResponse) (offers []string) {
		for _, x := range a.GetCandidates() {
			if x.GetFault() == "" {
				offers = append(offers, x.GetRef()+"\t"+plain(x.GetName()))
			}
		}
		return offers
	})
}

// completeWaits offers whom the rollout waits for.
func (c *cli) completeWaits(cmd *cobra.Command, _ []string, typed string) ([]string, cobra.ShellCompDirective) {
	return c.offer(cmd, typed, func(a *meshcav1.GetAuthoritiesResponse) []string {
		if a.GetRollout().GetStep() != "published" {
			return nil
		}
		return slices.Clone(a.GetRollout().GetWaits())
	})
}

// offer completes with what is known of the CA's authorities.
func (c *cli) offer(cmd *cobra.Command, typed string, offers func(*meshcav1.GetAuthoritiesResponse) []string) ([]string, cobra.ShellCompDirective) {
	ctx, cancel := context.WithTimeout(cmd.Context(), completionWait)
	defer cancel()
	a, err := c.authorities(ctx)
	if err != nil {
		return nil, cobra.ShellCompDirectiveNoFileComp
	}
	return distinct(offers(a), typed), cobra.ShellCompDirectiveNoFileComp
}
